"""Folders of Parquet and Arrow files, as the datasets library exports them."""

import random

import pyarrow
import pytest
from pyarrow import parquet

from dist_siglip.data.packing.columnar import columnar_files
from dist_siglip.data.packing.table import Columns, check_table, read_rows
from dist_siglip.errors import UserError
from tests.support.hostile import in_child
from tests.support.mutations import break_bytes
from tests.support.packing import packed, samples_of, shards_of
from tests.support.shards import caption, encode, picture

COUNT, PARTS = 14, 3
COLUMNS = Columns(keep_others=True, label="label")


def rows():
    return [
        {
            "image": {"bytes": encode(picture(i)), "path": f"{i}.png"},
            "caption": [caption(i), f"{caption(i)} again"],
            "label": i % 3,
            "id": f"p{i // 2}",
        }
        for i in range(COUNT)
    ]


def write(table, path, kind):
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=2)
        return
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def export(folder, kind, split="train"):
    """The rows in several files, named as the datasets library names them."""
    folder.mkdir(exist_ok=True)
    whole = pyarrow.Table.from_pylist(rows())
    ends = [0, 3, 11, COUNT]
    suffix = "parquet" if kind == "parquet" else "arrow"
    for i in range(PARTS):
        name = f"{split}-{i:05d}-of-{PARTS:05d}.{suffix}"
        write(whole.slice(ends[i], ends[i + 1] - ends[i]), folder / name, kind)
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_a_folder_of_parts_is_packed_as_one_table(tmp_path, kind):
    folder = export(tmp_path / "data", kind)
    write(pyarrow.Table.from_pylist(rows()), tmp_path / "whole.parquet", "parquet")
    packed(tmp_path / "whole.parquet", tmp_path / "a", None, columns=COLUMNS)
    packed(folder, tmp_path / "b", None, columns=COLUMNS)
    suffix = columnar_files(folder)[0].suffix
    packed(folder / f"train-*{suffix}", tmp_path / "c", None, columns=COLUMNS)
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b") == shards_of(tmp_path / "c")
    samples = samples_of(tmp_path / "b")
    assert [int(each["cls"]) for each in samples] == [i % 3 for i in range(COUNT)]
    assert b'"id": "p6"' in samples[13]["json"]
    assert samples[13]["png"] == encode(picture(13))
    for first in range(COUNT + 2):
        found = list(read_rows(folder, COLUMNS, first))
        assert [row.number for row in found] == list(range(first, COUNT))
        assert all(row.data == encode(picture(row.number)) for row in found)


def test_a_part_that_changed_is_another_table(tmp_path):
    folder = export(tmp_path / "data", "parquet")
    packed(folder, tmp_path / "out", None)
    write(pyarrow.Table.from_pylist(rows()), columnar_files(folder)[1], "parquet")
    with pytest.raises(UserError, match="was packed differently: table_digest"):
        packed(folder, tmp_path / "out", None)


def test_splits_are_not_mixed(tmp_path):
    folder = export(export(tmp_path / "data", "parquet"), "parquet", "test")
    with pytest.raises(UserError, match=r"the splits test, train; .*data/test-\*.parquet'"):
        check_table(folder, COLUMNS)
    assert len(columnar_files(folder / "test-*.parquet")) == PARTS
    export(tmp_path / "saved", "stream").joinpath("dataset_dict.json").write_text("{}")
    export(tmp_path / "saved" / "train", "stream")
    with pytest.raises(UserError, match=r"holds the splits train; .*saved/train$"):
        check_table(tmp_path / "saved", COLUMNS)


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_times_that_python_has_no_value_for_are_cut_or_rows_of_their_own(tmp_path, kind):
    """Times of nanoseconds, and a day of the year 2,739,877."""
    table = pyarrow.Table.from_pylist(rows()[:3]).append_column(
        "time", pyarrow.array([1_600_000_000_123_456_789, None, 0], pyarrow.timestamp("ns"))
    )
    table = table.append_column("day", pyarrow.array([0, 1, 10**9], "int32").cast("date32"))
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    write(table, path, kind)
    first, second, third = read_rows(path, COLUMNS)
    assert str(first.others["time"]) == "2020-09-13 12:26:40.123456"
    assert (first.problem, second.problem) == (None, None)
    assert second.others["time"] is None
    assert third.problem.startswith("row cannot be read: ")


def test_what_is_no_table_is_named(tmp_path):
    folder = export(export(tmp_path / "data", "parquet"), "stream")
    with pytest.raises(UserError, match=r"of \.arrow, \.parquet files; it must be of one kind"):
        check_table(folder, COLUMNS)
    with pytest.raises(UserError, match="is the pattern of no file"):
        check_table(folder / "valid-*.parquet", COLUMNS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no picture \(jpg, .*\) and no Parquet or Arrow file"):
        check_table(tmp_path / "empty", COLUMNS)
    with pytest.raises(UserError, match="has no column 'text'; it has image, caption"):
        check_table(folder / "*.arrow", Columns(captions=("text",)))
    (folder / "a.png").write_bytes(encode(picture(0)))
    assert columnar_files(folder) == []  # pictures, and tables about them


def test_broken_arrow_files_end_in_one_line(tmp_path):
    sound = {}
    for kind in ("stream", "file"):
        write(pyarrow.Table.from_pylist(rows()), tmp_path / "a.arrow", kind)
        sound[kind] = (tmp_path / "a.arrow").read_bytes()

    def read_broken():
        ends = set()
        for seed in range(150):
            draw = random.Random(seed)
            (tmp_path / "a.arrow").write_bytes(break_bytes(draw, sound[draw.choice(list(sound))]))
            try:
                ends.add(len(list(read_rows(tmp_path / "a.arrow", COLUMNS))) > 0)
            except UserError as error:
                ends.add("lines" if "\n" in str(error) else "refused")
        assert ends - {False} == {True, "refused"}

    in_child(read_broken)
