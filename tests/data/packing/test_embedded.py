"""Tables that hold the pictures themselves, and tables that hold classes."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from dist_siglip.cli import main
from dist_siglip.data.packing import columnar as module
from dist_siglip.data.packing.table import Columns, read_rows
from dist_siglip.errors import UserError
from dist_siglip.evaluation.classification import Classification
from tests.support.packing import packed, rows_of, samples_of, shards_of, skipped, write_table
from tests.support.shards import caption, encode, picture

COUNT = 13
BYTES = {"binary": pyarrow.binary(), "large": pyarrow.large_binary()}


def write_pictures(path, kind, count=COUNT, **options):
    """A Parquet file with pictures inside, as plain bytes or as the datasets library has them."""
    data = [encode(picture(i), ("PNG", "JPEG")[i % 2]) for i in range(count)]
    if kind == "struct":
        image = pyarrow.array([{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(data)])
    elif kind == "path":  # some only by their paths
        image = pyarrow.array(
            [{"bytes": None if i % 3 else b, "path": f"{i}.jpg"} for i, b in enumerate(data)]
        )
    else:
        image = pyarrow.array(data, BYTES[kind])
    table = pyarrow.table(
        {
            "image": image,
            "caption": [caption(i) for i in range(count)],
            "label": list(range(count)),
            "thumbnail": data,
        }
    )
    parquet.write_table(table, path, **{"row_group_size": 4, **options})
    return data


@pytest.mark.parametrize("kind", ["binary", "struct", "large"])
def test_pictures_inside_a_parquet_file_are_packed_as_they_are(tmp_path, kind):
    data = write_pictures(tmp_path / "t.parquet", kind)
    assert packed(tmp_path / "t.parquet", tmp_path / "out", None) == (3, COUNT, COUNT, 0)
    samples = samples_of(tmp_path / "out")
    assert [s.get("png") or s.get("jpg") for s in samples] == data
    assert [s["txt"].decode() for s in samples] == [caption(i) for i in range(COUNT)]


def test_a_path_beside_missing_bytes_is_followed(tmp_path):
    data = write_pictures(tmp_path / "t.parquet", "path")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(COUNT):
        if i % 3 and i != 4:
            (images / f"{i}.jpg").write_bytes(data[i])
    packed(tmp_path / "t.parquet", tmp_path / "out", images, max_bad_fraction=0.5)
    assert len(samples_of(tmp_path / "out")) == COUNT - 1
    assert [(r["row"], r["picture"]) for r in skipped(tmp_path / "out")] == [(4, "4.jpg")]


def test_packing_of_pictures_goes_on_at_the_row_group_it_stopped_in(tmp_path, monkeypatch):
    write_pictures(tmp_path / "t.parquet", "struct", count=40)
    packed(tmp_path / "t.parquet", tmp_path / "whole", None)
    made, make = [], module._row

    def stop(batch):
        made.append(1)
        if len(made) == 30:  # eight rows are read ahead
            raise KeyboardInterrupt
        return make(batch)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_row", stop)
        with pytest.raises(KeyboardInterrupt):
            packed(tmp_path / "t.parquet", tmp_path / "out", None, workers=1)
    done = json.loads((tmp_path / "out" / "pack.json").read_text())["progress"]["rows"]
    assert done >= 10
    made.clear()
    monkeypatch.setattr(module, "_row", lambda batch: made.append(1) or make(batch))
    packed(tmp_path / "t.parquet", tmp_path / "out", None)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
    assert len(made) == 1 + 40 - done  # the first one to check the table


@pytest.mark.parametrize("first", [0, 3, 4, 9, 12, 13, 99])
@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl"])
def test_reading_begins_at_any_row(tmp_path, first, name):
    rows = [{"image": f"{i}.jpg", "caption": caption(i)} for i in range(COUNT)]
    if name == "t.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name, row_group_size=4)
    else:
        write_table(tmp_path / name, rows)
    whole = list(read_rows(tmp_path / name, Columns()))
    assert [row.number for row in whole] == list(range(COUNT))
    assert list(read_rows(tmp_path / name, Columns(), first)) == whole[first:]


def test_no_more_than_a_few_row_groups_are_in_memory(tmp_path):
    data = [encode(picture(i, side=180)) for i in range(60)]
    table = pyarrow.table({"image": data, "caption": ["x"] * len(data)})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=5)
    del table
    start, most = pyarrow.total_allocated_bytes(), 0
    for row in read_rows(tmp_path / "t.parquet", Columns()):
        assert row.data == data[row.number]
        most = max(most, pyarrow.total_allocated_bytes() - start)
    assert 0 < most < 5 * 5 * len(data[0]) < sum(map(len, data)) / 2


def test_pictures_in_a_table_are_not_shuffled_in_memory(tmp_path):
    write_pictures(tmp_path / "t.parquet", "binary")
    with pytest.raises(UserError, match=r"shuffle_seed \(3\) needs all rows in memory"):
        packed(tmp_path / "t.parquet", tmp_path / "out", None, shuffle_seed=3)
    assert not (tmp_path / "out").exists()


def test_columns_of_bytes_are_not_kept_and_that_is_said(tmp_path, caplog):
    write_pictures(tmp_path / "t.parquet", "binary")
    packed(tmp_path / "t.parquet", tmp_path / "out", None, Columns(keep_others=True))
    assert json.loads(samples_of(tmp_path / "out")[3]["json"]) == {"label": 3}
    assert "columns that hold bytes are not kept: thumbnail" in caplog.text


def test_a_picture_in_a_table_that_does_not_decode_is_named_by_its_row(tmp_path):
    rows = [{"image": b"junk", "caption": "x"}, {"image": encode(picture(0)), "caption": "y"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    packed(tmp_path / "t.parquet", tmp_path / "out", None, max_bad_fraction=0.5)
    (record,) = skipped(tmp_path / "out")
    assert (record["row"], "no JPEG, PNG or WebP" in record["reason"]) == (0, True)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_classes_become_members_that_a_zero_shot_benchmark_reads(tmp_path, pictures, suffix):
    rows = [
        {**row, "label": i % 4 if suffix != ".csv" else f"{i % 4}"}
        for i, row in enumerate(rows_of())
    ]
    table = write_table(tmp_path / f"t{suffix}", rows)
    arguments = [str(table), str(tmp_path / "out"), f"--images={pictures}", "--json=true"]
    code = main(["data", "pack", *arguments, "--class_column=label", "--caption_column=null"])
    assert code == 0
    samples = samples_of(tmp_path / "out")
    assert [sample["cls"] for sample in samples] == [b"%d" % (i % 4) for i in range(len(rows))]
    assert not any("txt" in sample for sample in samples)
    benchmark = Classification(
        str(tmp_path / "out"), classes=["a", "b", "c", "d"], templates=["{}"]
    )
    benchmark.check()


def test_captions_and_classes_stand_side_by_side(tmp_path, pictures):
    rows = [{**row, "label": str(i)} for i, row in enumerate(rows_of(3))]
    table = write_table(tmp_path / "t.csv", rows)
    packed(table, tmp_path / "out", pictures, Columns(label="label"))
    assert [(s["txt"].decode(), s["cls"]) for s in samples_of(tmp_path / "out")] == [
        (caption(i), b"%d" % i) for i in range(3)
    ]


def test_what_is_no_class_is_counted_and_named(tmp_path, pictures):
    values = ["1", "cat", "-1", "", "1.5", "99999999999", "2"]
    rows = [{**row, "label": value} for row, value in zip(rows_of(7), values, strict=True)]
    table = write_table(tmp_path / "t.csv", rows)
    packed(table, tmp_path / "out", pictures, Columns(label="label"), max_bad_fraction=0.9)
    assert [record["row"] for record in skipped(tmp_path / "out")] == [1, 2, 3, 4, 5]
    reason = skipped(tmp_path / "out")[0]["reason"]
    assert reason == "column 'label' holds 'cat', not the number of a class, from 0"


def test_a_table_without_captions_needs_classes(tmp_path, pictures):
    table = write_table(tmp_path / "t.csv", rows_of(2))
    with pytest.raises(UserError, match=r"caption_column \(null\) needs a class_column"):
        packed(table, tmp_path / "out", pictures, Columns(captions=()))
    with pytest.raises(UserError, match="class_column needs a table"):
        packed(pictures, tmp_path / "out", None, Columns(label="label"))
    with pytest.raises(UserError, match=r"no column 'label'; .* and class_column"):
        packed(table, tmp_path / "out", pictures, Columns(label="label"))
