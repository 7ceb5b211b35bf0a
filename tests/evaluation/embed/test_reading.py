"""Embeddings read back from what embed writes, and rows matched by key."""

import pickle
import re

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.reading import Embeddings, match_rows, read_embeddings, towers_in
from dist_siglip.evaluation.embed.shard_job import JobRows, ShardJob, layout_of
from dist_siglip.evaluation.encoding import EncodedRows

SHARDS = ("a.tar", "b.tar", "c.tar")


def rows_of(seed, count, width=4):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float16)


def write(folder, layout, towers=("image", "text")):
    """Three shards of 3, 0 and 2 samples as embed writes them; shards repeat their keys."""
    parts = [
        ShardJob(number, str(number), shard, first, stop)
        for number, (shard, first, stop) in enumerate(
            zip(SHARDS, (0, 3, 3), (3, 3, 5), strict=True)
        )
    ]
    written = layout_of(layout, folder, parts, [])
    for part in parts:
        count = part.num_samples
        written.write(
            JobRows(
                part,
                EncodedRows(
                    sample_ids=list(range(part.first, part.stop)),
                    image_features=rows_of(part.number, count) if "image" in towers else None,
                    text_features=rows_of(9 + part.number, count) if "text" in towers else None,
                    captions=["x"] * count,
                    problems={},
                ),
                keys=[f"{place:03d}" for place in range(count)],
            )
        )
    written.finish()
    return folder


@pytest.mark.parametrize("layout", ["clip-retrieval", "parquet"])
def test_rows_come_back_with_their_keys_shard_after_shard(tmp_path, layout):
    folder = write(tmp_path / "out", layout)
    assert towers_in(folder) == ("image", "text")
    image, text = (read_embeddings(folder, tower) for tower in ("image", "text"))
    assert np.array_equal(image.features, np.concatenate([rows_of(0, 3), rows_of(2, 2)]))
    assert np.array_equal(text.features, np.concatenate([rows_of(9, 3), rows_of(11, 2)]))
    assert image.features.dtype == np.float16
    assert list(image.keys) == ["000", "001", "002", "000", "001"]
    assert list(image.shards) == ["a.tar"] * 3 + ["c.tar"] * 2


def test_a_parquet_file_may_be_named_itself(tmp_path):
    folder = write(tmp_path / "out", "parquet")
    there = read_embeddings(folder / "embeddings.parquet", "image")
    assert np.array_equal(there.features, read_embeddings(folder, "image").features)


def test_shards_are_in_the_order_of_their_numbers_not_of_their_names(tmp_path):
    for number in (10, 9):
        for name in ("img_emb", "metadata"):
            (tmp_path / name).mkdir(exist_ok=True)
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", np.full((1, 2), float(number)))
        table = pyarrow.table({"image_path": [f"k{number}"]})
        parquet.write_table(table, tmp_path / "metadata" / f"metadata_{number}.parquet")
    read = read_embeddings(tmp_path, "image")
    assert read.features[:, 0].tolist() == [9, 10]
    assert read.shards is None


def test_an_array_has_no_keys(tmp_path):
    np.save(tmp_path / "a.npy", rows_of(0, 3))
    read = read_embeddings(tmp_path / "a.npy", None)
    assert np.array_equal(read.features, rows_of(0, 3))
    assert read.keys is None
    assert towers_in(tmp_path / "a.npy") == ()


def side(keys=None, shards=None, count=None, source="a"):
    return Embeddings(source, np.ones((len(keys) if keys else count, 2)), keys, shards)


def matched(first, second):
    rows = match_rows(first, second)
    return list(zip(rows.first.tolist(), rows.second.tolist(), strict=True))


def test_rows_are_matched_by_shard_and_key_in_any_order():
    first = side(["1", "1", "2"], ["a", "b", "b"])
    second = side(["2", "1", "1"], ["b", "a", "c"])
    assert matched(first, second) == [(0, 1), (2, 0)]


def test_keys_alone_decide_where_a_side_knows_no_shards():
    assert matched(side(["1", "3"], ["a", "b"]), side(["3", "4", "1"])) == [(0, 2), (1, 0)]


def test_rows_without_keys_are_matched_by_number():
    assert matched(side(count=3), side(["x", "y", "z"])) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (side(count=3), side(count=2, source="b"), "a has 3 rows and b 2; without keys on both"),
        (side(["1"]), side(["2"], source="b"), "a and b have no key in common"),
        (side(["1", "1"]), side(["1"], source="b"), "a has key '1' in rows 0 and 1"),
        (side(["1"], ["s"]), side(["1", "1"], ["s", "s"], source="b"), "b has key '1' in rows"),
    ],
)
def test_rows_that_cannot_be_matched_are_refused(first, second, message):
    with pytest.raises(UserError, match=re.escape(message)):
        match_rows(first, second)


def _nothing(folder):
    return folder / "nowhere", "image"


def _one_tower(folder):
    return write(folder / "out", "clip-retrieval", towers=("text",)), "image"


def _no_tower(folder):
    return write(folder / "out", "clip-retrieval"), None


def _array_of_a_tower(folder):
    np.save(folder / "a.npy", rows_of(0, 3))
    return folder / "a.npy", "image"


def _array_of_objects(folder):
    with (folder / "a.npy").open("wb") as file:
        pickle.dump(print, file)
    return folder / "a.npy", None


def _array_of_one_dimension(folder):
    np.save(folder / "a.npy", np.ones(3))
    return folder / "a.npy", None


def _no_metadata(folder):
    made = write(folder / "out", "clip-retrieval")
    (made / "metadata" / "metadata_2.parquet").unlink()
    return made, "image"


def _other_metadata(folder):
    made = write(folder / "out", "clip-retrieval")
    (made / "metadata" / "metadata_0.parquet").rename(made / "metadata" / "metadata_2.parquet")
    (made / "img_emb" / "img_emb_0.npy").unlink()
    return made, "image"


def _other_width(folder):
    made = write(folder / "out", "clip-retrieval")
    np.save(made / "img_emb" / "img_emb_2.npy", rows_of(0, 2, 5))
    return made, "image"


def _no_parquet(folder):
    (folder / "a.parquet").write_bytes(b"PAR1 no")
    return folder / "a.parquet", "image"


def _text_in_place_of_rows(folder):
    table = pyarrow.table({"image_path": ["k"], "image_embedding": ["numbers"]})
    parquet.write_table(table, folder / "a.parquet")
    return folder / "a.parquet", "image"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nothing, "do not exist; give a folder of embed"),
        (_one_tower, "hold text, not image"),
        (_no_tower, "hold image and text, not one tower alone"),
        (_array_of_a_tower, "does not say whose embeddings it holds; leave image out"),
        (_array_of_objects, "is no readable .npy file of numbers"),
        (_array_of_one_dimension, "must hold one (rows, D) array of floats; got (3,)"),
        (_no_metadata, "has no metadata_2.parquet; start embed again"),
        (_other_metadata, "has 2 rows and metadata_2.parquet 3"),
        (_other_width, "holds rows of different widths"),
        (_no_parquet, "is no readable Parquet file"),
        (_text_in_place_of_rows, "holds no rows of numbers in image_embedding"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, make, message):
    with pytest.raises(UserError) as caught:
        read_embeddings(*make(tmp_path))
    assert message in str(caught.value)
