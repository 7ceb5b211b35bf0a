from pathlib import Path

from dist_siglip.health import start_check
from dist_siglip.health.start_check import describe_start, digest_of_sources


def differing(one, other):
    first, second = describe_start(one), describe_start(other)
    return [name for name in first | second if first.get(name) != second.get(name)]


def test_a_setting_that_differs_is_found_by_its_path():
    one = {"model": {"optim": {"learning_rate": 0.1}}, "trainer": {"max_steps": 5}}
    other = {"model": {"optim": {"learning_rate": 0.2}}, "trainer": {"max_steps": 5}}
    assert differing(one, other) == ["model.optim.learning_rate"]


def test_a_node_may_have_its_shards_and_cache_elsewhere_but_must_have_them():
    one = {"data": {"train_shards": "/a", "val_shards": "/a/v", "cache": {"folder": "/tmp/1"}}}
    other = {"data": {"train_shards": "/b", "val_shards": None, "cache": {"folder": "/tmp/2"}}}
    assert differing(one, other) == ["data.val_shards"]


def test_the_digest_follows_every_source_of_the_package(tmp_path, monkeypatch):
    package = tmp_path / "dist_siglip"
    (package / "runs").mkdir(parents=True)
    (package / "losses.py").write_text("a = 1\n")
    monkeypatch.setattr(start_check, "__file__", str(package / "runs" / "start_check.py"))
    digests = []
    for content in ("a = 1\n", "a = 2\n", "a = 1\n"):
        Path(package / "losses.py").write_text(content)
        digest_of_sources.cache_clear()
        digests.append(digest_of_sources())
    digest_of_sources.cache_clear()
    assert digests[0] == digests[2] != digests[1]
