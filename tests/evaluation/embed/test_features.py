import numpy as np
import pytest

from dist_siglip.data.samples.cached_features import FeatureFile, feature_path
from dist_siglip.distributed import World
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from tests.support.embedding import COUNTS, build_tiny, expected_rows, table_of
from tests.support.shards import caption, encode, picture, write_shard, write_shards


def settings_of(**options):
    defaults = {"format": "features", "dtype": "float32", "workers": 0, "device": "cpu"}
    return EmbedSettings(**defaults | options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"))


def read_rows(folder, table, tower):
    """The row of each sample of a table; None for one that has none."""
    rows = []
    for line, count in zip(table.shard_lines.split("\n"), table.counts, strict=True):
        file = FeatureFile(feature_path(folder, line))
        rows += [file.row(place, tower) for place in range(count)]
    return rows


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_sample_finds_the_features_of_both_towers(tmp_path, built, world_size):
    table = table_of(write_shards(tmp_path / "shards", COUNTS))
    for rank in range(world_size):
        world = World(rank=rank, world_size=world_size)
        embed_shards(table, built, tmp_path / "out", settings_of(), world=world)
    images, texts = expected_rows(built, range(sum(COUNTS)))
    for tower, expected in (("image", images), ("text", texts)):
        found = np.stack([row.numpy() for row in read_rows(tmp_path / "out", table, tower)])
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_bad_sample_has_no_row_and_is_named(tmp_path, built):
    members = [
        (f"{i:06d}", {"png": encode(picture(i)), "txt": caption(i).encode()}) for i in range(4)
    ]
    members[1][1]["png"] = b"no picture"
    empty = [("bad", {"png": b"no picture", "txt": b"a hen"})]
    shards = [
        str(write_shard(tmp_path / "0.tar", members)),
        str(write_shard(tmp_path / "1.tar", empty)),
    ]
    table, out = table_of(shards), tmp_path / "out"
    settings = settings_of(towers="image", max_bad_fraction=0.5)
    for kept in (0, 2):  # a shard without any row is finished too
        report = embed_shards(table, built, out, settings)
        assert (report.kept, report.samples, report.left_out) == (kept, 5, 2)
    rows = read_rows(out, table, "image")
    assert [row is None for row in rows] == [False, True, False, False, True]
    images, _ = expected_rows(built, [0, 2, 3])
    np.testing.assert_allclose(
        np.stack([r.numpy() for r in rows if r is not None]), images, atol=1e-6
    )
    assert '"key": "000001"' in (out / "left_out" / "left_out_0.jsonl").read_text()


def test_a_damaged_file_is_an_error_that_names_it(tmp_path, built):
    table = table_of(write_shards(tmp_path / "shards", (2,)))
    embed_shards(table, built, tmp_path / "out", settings_of())
    path = feature_path(tmp_path / "out", table.shard_lines)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"{path.name} is damaged .*; delete it and start again"):
        embed_shards(table, built, tmp_path / "out", settings_of())
