import os
from pathlib import Path

import pytest

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.remote import CacheSettings, ShardCache, connections
from dist_siglip.distributed import World
from dist_siglip.errors import OutageError, UserError
from dist_siglip.evaluation import embed
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from tests.support.embedding import COUNTS, build_tiny, load_rows, table_of
from tests.support.servers import serve
from tests.support.shards import write_shards

FP32 = EmbedSettings(dtype="float32", workers=0, device="cpu")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Shards on the disk, the same on a server, and an empty home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(connections, "_FIRST_PAUSE_SECONDS", 0.01)
    shards = write_shards(tmp_path / "shards", COUNTS)
    with serve() as server:
        server.files = {os.path.basename(path): Path(path).read_bytes() for path in shards}
        yield shards, server


def remote_table(server, folder, **settings):
    cache = ShardCache(CacheSettings(folder=str(folder), **settings))
    urls = [f"{server.url}{name}" for name in sorted(server.files)]
    return build_pair_table(urls, image_extensions=("png",), cache=cache)


def test_remote_shards_give_the_rows_of_local_ones(served, tmp_path):
    shards, server = served
    built = build_tiny(tmp_path)
    embed_shards(table_of(shards), built, tmp_path / "local", FP32)
    half = 0.5 * sum(map(len, server.files.values())) / 2**30
    table = remote_table(server, tmp_path / "cache", max_gib=half)
    embed_shards(table, built, tmp_path / "remote", FP32)
    for name in ("img_emb", "text_emb"):
        expected = load_rows(tmp_path / "local", name)
        assert (load_rows(tmp_path / "remote", name) == expected).all()


def test_a_shard_out_of_reach_is_not_a_shard_of_bad_samples(served, tmp_path):
    _, server = served
    built = build_tiny(tmp_path)
    table = remote_table(server, tmp_path / "cache", attempts=1, patience_seconds=0.0)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    shard = server.files.pop("00002.tar")
    settings = EmbedSettings(workers=0, device="cpu", max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"shard '00002.tar' is out of reach.*start again"):
        embed_shards(table, built, tmp_path / "out", settings)
    assert not (tmp_path / "out" / "left_out").exists()
    server.files["00002.tar"] = shard
    server.answers["00002.tar"] = [503] * 1000
    with pytest.raises(OutageError, match=r"shard '00002.tar' is out of reach.*start again"):
        embed_shards(table, built, tmp_path / "out", settings)
    server.answers.clear()
    report = embed_shards(table, built, tmp_path / "out", settings)
    assert (report.kept, report.left_out) == (2, 0)


def test_the_first_rank_of_a_node_fetches_for_its_node(served, tmp_path, monkeypatch):
    _, server = served
    fetched = []

    class Recorder:
        def __init__(self, cache, upcoming):
            self.upcoming = upcoming

        def start(self):
            fetched.append([url[-9:] for url in self.upcoming()])

        def stop(self):
            pass

    monkeypatch.setattr(embed, "Prefetcher", Recorder)
    table = remote_table(server, tmp_path / "cache")
    built = build_tiny(tmp_path)
    for rank in (1, 3, 0, 2):  # two nodes of two ranks; shard 1 is done when rank 0 starts
        world = World(rank=rank, world_size=4, local_rank=rank % 2, local_world_size=2)
        embed_shards(table, built, tmp_path / "out", FP32, world=world)
    assert fetched == [["00000.tar"], ["00002.tar"]]
