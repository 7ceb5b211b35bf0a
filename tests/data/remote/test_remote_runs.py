"""Runs that read their shards from a web server see what they would see from the local disk."""

import os
from pathlib import Path

import pytest
import torch

from dist_siglip.data.index.read import read_index
from dist_siglip.data.remote import CacheSettings, ShardCache, connections
from dist_siglip.errors import OutageError, UserError
from tests.support.servers import serve
from tests.support.shards import UNEVEN, write_shards
from tests.training.datamodule.test_datamodule import make_data, pytestmark, run_to  # noqa: F401 - its warnings too


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Shards on the disk, the same on a server, and an empty home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(connections, "_FIRST_PAUSE_SECONDS", 0.01)
    shards = write_shards(tmp_path / "shards")
    with serve() as server:
        server.files = {os.path.basename(path): Path(path).read_bytes() for path in shards}
        yield shards, server


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_local_shards_through_a_cache_that_holds_half(
    served, tmp_path, workers
):
    shards, server = served
    expected = run_to(9, make_data(shards), tmp_path)
    total = sum(map(len, server.files.values()))
    data = make_data(
        server.url + "{00000..00005}.tar",
        workers_per_rank=workers,
        cache=CacheSettings(folder=str(tmp_path / "cache"), max_gib=0.5 * total / 2**30),
    )
    data.check(1)
    assert data.plan is None
    seen = run_to(9, data, tmp_path)
    assert [ids for ids, _ in seen] == [ids for ids, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, expected, strict=True))
    held = sum(e.stat().st_size for e in os.scandir(tmp_path / "cache") if e.name.endswith(".tar"))
    assert 0 < held <= 0.5 * total


def test_a_shard_that_cannot_be_fetched_any_more_is_replaced_and_named(served, tmp_path):
    _, server = served
    log = tmp_path / "bad.jsonl"
    data = make_data(
        server.url + "{00000..00005}.tar",
        cache=CacheSettings(folder=str(tmp_path / "cache"), attempts=1),
        bad_sample_log=str(log),
        max_bad_fraction=0.9,
    )
    data.check(1)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    del server.files["00002.tar"]
    run_to(4, data, tmp_path)
    assert "00002.tar cannot be fetched" in log.read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_is_down_during_training_is_waited_for_and_costs_no_sample(
    served, tmp_path, workers
):
    shards, server = served
    expected = run_to(4, make_data(shards), tmp_path)
    log = tmp_path / "bad.jsonl"

    def data(patience_seconds):
        made = make_data(
            server.url + "{00000..00005}.tar",
            workers_per_rank=workers,
            cache=CacheSettings(
                folder=str(tmp_path / "cache"), attempts=1, patience_seconds=patience_seconds
            ),
            bad_sample_log=str(log),
        )
        made.check(1)
        for path in (tmp_path / "cache").glob("*.tar"):
            path.unlink()
        return made

    down = {name: [503] * 6 for name in server.files}
    waiting = data(200.0)
    server.answers = {name: list(answers) for name, answers in down.items()}
    seen = run_to(4, waiting, tmp_path)
    assert [ids for ids, _ in seen] == [ids for ids, _ in expected]
    assert not log.exists()
    assert any(len(left) < 6 for left in server.answers.values())
    server.answers = {}
    impatient = data(0.0)
    server.answers = {name: [503] * 100_000 for name in server.files}
    with pytest.raises(OutageError, match="the server answered 503"):
        run_to(4, impatient, tmp_path)
    impatient.teardown("fit")  # which a process that ends does not need
    assert not log.exists()


def test_a_missing_remote_shard_is_refused_in_one_line(served, tmp_path):
    _, server = served
    with pytest.raises(
        UserError, match=r"00006\.tar cannot be fetched .*it does not exist"
    ) as info:
        make_data(server.url + "{00000..00006}.tar").check(1)
    assert "\n" not in str(info.value)


def test_side_cars_beside_remote_shards_spare_the_download(served, tmp_path):
    shards, server = served
    cache = ShardCache(CacheSettings(folder=str(tmp_path / "cache")))
    for path in shards:
        read_index(path)
        name = os.path.basename(path)
        server.files[f"{name}.idx.npz"] = Path(f"{path}.idx.npz").read_bytes()
    data = make_data(server.url + "{00000..00005}.tar", cache=cache.settings)
    data.check(1)
    assert data.tables.of("train_shards").counts == UNEVEN
    assert not any(name.endswith(".tar") for name in server.gets())
    run_to(2, data, tmp_path)  # though nothing was fetched yet on this node
    server.counts.clear()
    make_data(server.url + "{00000..00005}.tar", cache=cache.settings).check(1)
    assert server.gets() == {}  # the side-cars are kept at home


def test_a_side_car_of_another_file_is_not_believed(served, tmp_path):
    shards, server = served
    cache = ShardCache(CacheSettings(folder=str(tmp_path / "cache")))
    read_index(shards[1])
    server.files["00000.tar.idx.npz"] = Path(f"{shards[1]}.idx.npz").read_bytes()
    server.files["00003.tar.idx.npz"] = b"junk"
    for number in (0, 3):
        index = read_index(f"{server.url}0000{number}.tar", cache=cache)
        assert index.num_samples == UNEVEN[number]
