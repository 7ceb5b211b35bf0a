"""Parquet on a hub: named by stars, indexed by the end of each file, read from copies."""

import functools
import http.server
import os
from pathlib import Path

import pytest

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.index.read import read_index
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.remote import CacheSettings, ShardCache, connections
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS, PicturePolicy
from dist_siglip.data.samples.transforms import training_transform
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError
from tests.data.remote.test_hubs import hub  # noqa: F401 - a fixture
from tests.support.parquet import write_parquet
from tests.support.servers import running
from tests.support.shards import caption, tiny_inputs

PLACES = ["gs://shards/", "hf://datasets/me/shards/"]


@pytest.fixture
def served(hub, tmp_path, monkeypatch):  # noqa: F811
    """The stand-in, with two files in folders, and a cache of this user that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = write_parquet(tmp_path / "files", (5, 6), compression="none")
    bodies = [Path(path).read_bytes() for path in paths]
    hub.files = {f"train/en/{i}.parquet": body for i, body in enumerate(bodies)}
    return hub


def table_of(shards, cache, **options):
    return build_pair_table(shards, image_extensions=PICTURE_EXTENSIONS, cache=cache, **options)


@pytest.mark.parametrize("place", PLACES)
def test_files_are_named_by_stars_indexed_by_their_end_and_read(served, tmp_path, place):
    shards = expand_shards(f"{place}**/*.parquet")
    assert shards == [f"{place}train/en/{i}.parquet" for i in range(2)]
    cache = ShardCache(CacheSettings(folder=str(tmp_path / "shards")))
    table = table_of(shards, cache)
    assert table.counts == (5, 6)
    assert not os.path.exists(tmp_path / "shards")  # no file was fetched whole
    again = table_of(shards, cache)
    assert again.fingerprint == table.fingerprint
    asked = len(served.ranges)
    assert table_of(shards, cache).num_samples == 11
    assert len(served.ranges) == asked  # the footers are kept
    data = PairDataset(
        table, training_transform(tiny_inputs(), None), seed=0, pictures=PicturePolicy()
    )
    found = [data[StreamPosition(0, 0, i)] for i in (10, 0)]
    assert [sample.caption for sample in found] == [caption(10), caption(0)]
    assert not any(sample.is_substitute for sample in found)


def test_a_changed_file_is_indexed_again_and_a_damaged_record_too(served, tmp_path, caplog):
    cache = ShardCache(CacheSettings(folder=str(tmp_path / "shards")))
    shard = "hf://datasets/me/shards/train/en/0.parquet"
    assert read_index(shard, cache=cache).num_samples == 5
    (kept,) = (tmp_path / "cache").rglob("*.footer")
    kept.write_bytes(kept.read_bytes()[:200])
    assert read_index(shard, cache=cache).num_samples == 5
    served.files["train/en/0.parquet"] = served.files["train/en/1.parquet"]
    connections._begin_anew()
    assert read_index(shard, cache=cache).num_samples == 6


def test_a_server_without_ranges_gives_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_parquet(tmp_path / "files", (80,), compression="none")  # longer than a tail
    (tmp_path / "files" / "junk.parquet").write_bytes(bytes(100_000))
    files = str(tmp_path / "files")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    connections._begin_anew()
    cache = ShardCache(CacheSettings(folder=str(tmp_path / "shards"), attempts=1))
    with running(functools.partial(Handler, directory=files)) as url:
        table = table_of([f"{url}/00000.parquet"], cache)
        assert table.counts == (80,)
        assert any(name.endswith(".tar") for name in os.listdir(tmp_path / "shards"))
        with pytest.raises(UserError, match="is damaged: it does not end as a Parquet file does"):
            table_of([f"{url}/junk.parquet"], cache)
