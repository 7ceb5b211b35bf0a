import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dist_siglip.distributed import World
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from tests.support.embedding import COUNTS, build_tiny, expected_rows, table_of
from tests.support.shards import caption, encode, picture, write_shard, write_shards

PARQUET = EmbedSettings(format="parquet", dtype="float32", workers=0, device="cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), COUNTS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"))


def embed_as(rank, world_size, shards, built, out):
    world = World(rank=rank, world_size=world_size)
    return embed_shards(table_of(shards), built, out, PARQUET, world=world)


def test_one_file_holds_metadata_and_embeddings_of_all_shards(tmp_path, shards, built):
    embed_shards(table_of(shards), built, tmp_path, PARQUET)
    table = parquet.read_table(tmp_path / "embeddings.parquet")
    ids = range(sum(COUNTS))
    images, texts = expected_rows(built, ids)
    for name, rows in (("image_embedding", images), ("text_embedding", texts)):
        assert table.schema.field(name).type == pyarrow.list_(pyarrow.float32(), 8)
        np.testing.assert_allclose(np.array(table[name].to_pylist()), rows, atol=1e-6)
    assert table["image_path"].to_pylist() == [f"{i:06d}" for i in ids]
    assert table["caption"].to_pylist() == [caption(i) for i in ids]
    assert {path.name for path in tmp_path.iterdir()} == {
        "embed.json",
        "source.json",
        "embeddings.parquet",
        ".lock",
    }


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_numbers_have_the_type_that_was_asked_for(tmp_path, shards, built, dtype):
    settings = EmbedSettings(format="parquet", towers="image", dtype=dtype, workers=0, device="cpu")
    embed_shards(table_of(shards), built, tmp_path, settings)
    table = parquet.read_table(tmp_path / "embeddings.parquet")
    assert table["image_embedding"].combine_chunks().flatten().to_numpy().dtype == dtype
    assert "text_embedding" not in table.column_names


def test_the_rank_that_finishes_last_joins_the_parts(tmp_path, shards, built):
    embed_shards(table_of(shards), built, tmp_path / "one", PARQUET)
    joined = tmp_path / "many" / "embeddings.parquet"
    for rank in (2, 0, 1):
        assert not joined.exists()
        embed_as(rank, 3, shards, built, tmp_path / "many")
    assert joined.read_bytes() == (tmp_path / "one" / "embeddings.parquet").read_bytes()


def test_a_joined_file_is_not_written_again(tmp_path, shards, built):
    for rank in (0, 1):
        embed_as(rank, 2, shards, built, tmp_path)
    before = (tmp_path / "embeddings.parquet").stat().st_mtime_ns
    reports = [embed_as(rank, 3, shards, built, tmp_path) for rank in range(3)]
    assert [(r.kept, r.samples, r.left_out) for r in reports] == [(2, 12, 0), (1, 1, 0), (1, 12, 0)]
    assert (tmp_path / "embeddings.parquet").stat().st_mtime_ns == before
    assert not (tmp_path / "parts").exists()


def test_parts_of_a_process_killed_after_joining_are_removed(tmp_path, shards, built):
    embed_as(0, 2, shards, built, tmp_path)
    left = tmp_path / "parts" / "part_0.parquet"
    content = left.read_bytes()
    embed_as(1, 2, shards, built, tmp_path)
    left.parent.mkdir()
    left.write_bytes(content)
    embed_as(0, 1, shards, built, tmp_path)
    assert not left.parent.exists()


def test_a_shard_without_any_row_is_joined_too(tmp_path, built):
    members = [("a", {"png": b"no picture", "txt": b"a hen"})]
    sound = [("b", {"png": encode(picture(0)), "txt": caption(0).encode()})]
    paths = [
        str(write_shard(tmp_path / "0.tar", members)),
        str(write_shard(tmp_path / "1.tar", sound)),
    ]
    settings = EmbedSettings(format="parquet", workers=0, device="cpu", max_bad_fraction=0.5)
    for kept in (0, 2):
        report = embed_shards(table_of(paths), built, tmp_path / "out", settings)
        assert (report.kept, report.samples, report.left_out) == (kept, 2, 1)
    table = parquet.read_table(tmp_path / "out" / "embeddings.parquet")
    assert table["image_path"].to_pylist() == ["b"]
