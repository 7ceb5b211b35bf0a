import json
import os

import pytest
from PIL import Image

from dist_siglip.data.packing.table import Columns
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.errors import UserError
from dist_siglip.system.process_lock import ProcessLock
from tests.support.packing import packed, rows_of, samples_of, shards_of, skipped, write_table
from tests.support.shards import encode, picture


def test_another_table_or_other_settings_are_refused_with_the_difference(tmp_path, pictures):
    table = write_table(tmp_path / "t.csv", rows_of())
    packed(table, tmp_path / "out", pictures)
    with pytest.raises(UserError, match="samples_per_shard was 5 and is 6; give the same"):
        packed(table, tmp_path / "out", pictures, samples_per_shard=6)
    with pytest.raises(UserError, match=r"pillow was None and is .*; resize_short_side was None"):
        packed(table, tmp_path / "out", pictures, resize_short_side=9)
    other = write_table(tmp_path / "t2.csv", rows_of(3))
    with pytest.raises(UserError, match=r"table was 't\.csv' and is 't2\.csv'; table_digest was"):
        packed(other, tmp_path / "out", pictures)


def test_a_call_with_a_slip_leaves_nothing_in_the_way_of_the_right_one(tmp_path, pictures):
    table, out = write_table(tmp_path / "t.csv", rows_of()), tmp_path / "out"
    for columns in (Columns("picture"), Columns(captions=("text",))):
        with pytest.raises(UserError, match="has no column"):
            packed(table, out, pictures, columns)
        assert not out.exists()  # nothing is written before the inputs were looked at
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="is exceeded: 11 of 11 rows"):
        packed(table, out, tmp_path / "elsewhere")
    assert (out / "pack.json").exists()
    assert packed(table, out, pictures).samples == 23
    assert skipped(out) == []
    with pytest.raises(UserError, match="was packed differently"):  # there is something now
        packed(table, out, pictures, samples_per_shard=6)


UNCLOSED = {
    "to the end": 'image,caption\n0.jpg,hen\n1.jpg,"a cat\n2.jpg,a dog\n3.jpg,a fox\n',
    "to a quote": 'image,caption\n0.jpg,hen\n1.jpg,"a cat\n2.jpg,a dog\n3.jpg,"a fox"\n',
    "to a quote at the end of a row": 'image,caption\n0.jpg,hen\n1.jpg,"a cat\n2.jpg,a fox"\n',
    "text behind a quote": 'image,caption\n0.jpg,hen\n1.jpg,"a" cat\n',
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("kind", UNCLOSED)
def test_a_quote_that_is_not_closed_is_refused_with_its_line(tmp_path, pictures, kind, suffix):
    table = tmp_path / f"t{suffix}"
    text = UNCLOSED[kind]
    table.write_text(text.replace(",", "\t") if suffix == ".tsv" else text)
    with pytest.raises(UserError, match="broken in the row that begins at line 3") as info:
        packed(table, tmp_path / "out", pictures)
    assert "is a quote there not closed?" in str(info.value)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "out").exists()


def test_quotes_that_are_in_order_are_read(tmp_path, pictures):
    table = tmp_path / "t.csv"
    text = 'image,caption\n0.jpg,"two\nlines, a comma"\n1.jpg,"a ""b"""\n2.jpg,5" long\n'
    table.write_text(text)
    packed(table, tmp_path / "out", pictures)
    captions = [sample["txt"].decode() for sample in samples_of(tmp_path / "out")]
    assert captions == ["two\nlines, a comma", 'a "b"', '5" long']


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ";"), (".csv", "\t"), (".tsv", ",")])
def test_another_separator_is_named(tmp_path, pictures, suffix, separator):
    table = tmp_path / f"t{suffix}"
    table.write_text(f"image{separator}caption\n0.jpg{separator}a hen, two\n")
    with pytest.raises(UserError) as info:
        packed(table, tmp_path / "out", pictures)
    assert f"{separator!r} seems to separate more" in str(info.value)
    assert "with ',' as .csv, or with tabs as .tsv" in str(info.value)


def test_nothing_foreign_is_overwritten(tmp_path, pictures):
    table = write_table(tmp_path / "t.csv", rows_of())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds '00000\.tar' and no pack\.json"):
        packed(table, tmp_path / "mine", pictures)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["00000.tar"]

    packed(table, tmp_path / "out", pictures)
    manifest = json.loads((tmp_path / "out" / "pack.json").read_text())
    manifest["progress"] = dict.fromkeys(manifest["progress"], 0)
    (tmp_path / "out" / "pack.json").write_text(json.dumps(manifest))
    (tmp_path / "out" / "00002.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"00002\.tar exists and is not the shard of these rows"):
        packed(table, tmp_path / "out", pictures)
    assert (tmp_path / "out" / "00002.tar").read_bytes() == b"mine"


def test_two_processes_do_not_write_into_one_folder(tmp_path, pictures):
    table = write_table(tmp_path / "t.csv", rows_of(2))
    packed(table, tmp_path / "out", pictures)
    with (
        ProcessLock(str(tmp_path / "out" / ".lock")),
        pytest.raises(UserError, match="being written by another thread"),
    ):
        packed(table, tmp_path / "out", pictures)


@pytest.mark.parametrize("name", [".lock", "pack_skipped.jsonl"])
def test_nothing_outside_is_written_to(tmp_path, pictures, name):
    table = write_table(tmp_path / "t.csv", rows_of(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be used: Too many levels of symbolic links"):
        packed(table, tmp_path / "out", pictures)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_missing_shard_or_a_damaged_manifest_is_named(tmp_path, pictures):
    table = write_table(tmp_path / "t.csv", rows_of())
    packed(table, tmp_path / "out", pictures)
    (tmp_path / "out" / "00003.tar").unlink()
    with pytest.raises(UserError, match=r"lacks 00003\.tar"):
        packed(table, tmp_path / "out", pictures)
    (tmp_path / "out" / "pack.json").write_text("{")
    with pytest.raises(UserError, match=r"pack\.json is damaged"):
        packed(table, tmp_path / "out", pictures)


BAD = {
    "missing.jpg": "cannot be read: No such file",
    "junk.jpg": "cannot be decoded",
    "cut.jpg": "cannot be decoded",
    "big.jpg": r"picture of 300 x 300 pixels",
    "pipe.jpg": "not a regular file",
    "folder.jpg": "Is a directory",
    "": "holds no path",
    "n" * 5000: "File name too long",
}


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path):
    images = tmp_path / "in"
    (images / "folder.jpg").mkdir(parents=True)
    (images / "good.jpg").write_bytes(encode(picture(0)))
    (images / "junk.jpg").write_bytes(b"junk")
    (images / "cut.jpg").write_bytes(encode(picture(0), "JPEG")[:-200])
    (images / "big.jpg").write_bytes(encode(Image.new("RGB", (300, 300))))
    os.mkfifo(images / "pipe.jpg")
    rows = [{"image": "good.jpg", "caption": "a hen"}, {"image": "good.jpg", "caption": "  "}]
    rows += [{"image": name, "caption": "a hen"} for name in BAD]
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(UserError, match=r"max_bad_fraction \(0\.5\) is exceeded: 9 of 10 rows"):
        packed(
            table,
            tmp_path / "out",
            images,
            pictures=PicturePolicy(max_image_pixels=80_000),
            max_bad_fraction=0.5,
        )
    report = packed(
        table,
        tmp_path / "out",
        images,
        pictures=PicturePolicy(max_image_pixels=80_000),
        max_bad_fraction=1,
    )
    assert report == (1, 10, 1, 9)
    records = skipped(tmp_path / "out")
    assert [record["row"] for record in records] == list(range(1, 10))
    assert records[0]["reason"] == "caption is empty"
    for record, part in zip(records[1:], BAD.values(), strict=True):
        assert part in record["reason"]


def test_damaged_lines_of_a_table_are_counted_and_named(tmp_path, pictures):
    table = tmp_path / "t.jsonl"
    good = json.dumps(rows_of(1)[0]).encode()
    lines = {
        b"{not json": "not JSON",
        b"[1]": "not a JSON object",
        b'{"image": "0.jpg"}': "column 'caption' is missing",
        b'{"image": 3, "caption": "x"}': "column 'image' holds no path",
        b'{"image": "0.jpg", "caption": 4}': "column 'caption' holds int, not text",
        b'{"image": "0.jpg", "caption": "\xff"}': "caption is not UTF-8",
        b'{"image": "0.jpg", "caption": "\\ud800"}': "caption is not UTF-8",
        b'{"image": "\\ud800", "caption": "x"}': "cannot be a path",
        b'{"image": "a\\u0000b", "caption": "x"}': "holds no path",
        b"[" * 100_000: "not JSON",
    }
    table.write_bytes(b"\n".join([good, *lines, good]))
    report = packed(table, tmp_path / "out", pictures, max_bad_fraction=0.9)
    assert (report.samples, report.skipped) == (2, len(lines))
    for record, part in zip(skipped(tmp_path / "out"), lines.values(), strict=True):
        assert part in record["reason"]


def test_damaged_csv_rows_are_counted_and_named(tmp_path, pictures):
    table = tmp_path / "t.csv"
    table.write_bytes(b"image,caption\n0.jpg,hen\n1.jpg\n\n2.jpg,a,b\n3.jpg,\xff\n4.jpg,cock\n")
    report = packed(table, tmp_path / "out", pictures, max_bad_fraction=0.9)
    assert (report.rows, report.samples) == (5, 2)
    assert [record["row"] for record in skipped(tmp_path / "out")] == [1, 2, 3]


def test_too_many_bad_rows_stop_before_the_end(tmp_path, pictures):
    rows = [{"image": "missing.jpg", "caption": "x"}] * 5000
    with pytest.raises(UserError, match=r"exceeded: 11 of 11 rows .* first \{\"row\": 0"):
        packed(write_table(tmp_path / "t.csv", rows), tmp_path / "out", pictures)


@pytest.mark.parametrize("path", ["../secret.jpg", "{absolute}", "link.jpg", "linked/secret.jpg"])
def test_pictures_outside_the_folder_are_refused(tmp_path, path):
    (tmp_path / "secret.jpg").write_bytes(encode(picture(0)))
    images = tmp_path / "in"
    images.mkdir()
    (images / "link.jpg").symlink_to("../secret.jpg")
    (images / "linked").symlink_to("..")
    row = {"image": path.format(absolute=tmp_path / "secret.jpg"), "caption": "x"}
    table = write_table(tmp_path / "t.csv", [row])
    with pytest.raises(UserError, match="of row 0 lies outside the images folder"):
        packed(table, tmp_path / "out", images)
    assert packed(table, tmp_path / "out", images, allow_outside=True).samples == 1


def test_a_folder_whose_name_begins_like_the_images_folder_is_outside(tmp_path):
    for name in ("in", "in2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(encode(picture(0)))
    table = write_table(tmp_path / "t.csv", [{"image": "../in2/0.jpg", "caption": "x"}])
    with pytest.raises(UserError, match="outside"):
        packed(table, tmp_path / "out", tmp_path / "in")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 0}, r"samples_per_shard \(0\) must be at least 1"),
        ({"jpeg_quality": 96}, r"jpeg_quality \(96\) must be at most 95"),
        ({"workers": 0}, r"workers \(0\) must be at least 1"),
        ({"max_bad_fraction": 2}, r"max_bad_fraction \(2\) must be in \[0, 1\]"),
        ({"columns": Columns("picture")}, r"no column 'picture'; it has image, caption, site"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, pictures, options, message):
    table = write_table(tmp_path / "t.csv", rows_of(2))
    with pytest.raises(UserError, match=message):
        packed(table, tmp_path / "out", pictures, **options)


def test_parquet_whose_names_are_not_utf8_is_refused(tmp_path, pictures):
    table = write_table(tmp_path / "t.parquet", rows_of(2))
    table.write_bytes(table.read_bytes().replace(b"caption", b"capt\xff\xf0n"))
    with pytest.raises(UserError, match=r"no readable Parquet file: .*codec can't decode"):
        packed(table, tmp_path / "out", pictures)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.csv", None, "does not exist"),
        ("table.xlsx", b"x", r"must be a folder or one of \.csv"),
        ("junk.parquet", b"junk", "no readable Parquet file"),
        ("empty.csv", b"", "has no rows"),
        ("empty.jsonl", b"", "has no rows"),
        ("twice.csv", b"image,image\n", "names a column twice"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, pictures, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        packed(tmp_path / name, tmp_path / "out", pictures)


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, pictures, monkeypatch):
    table = write_table(tmp_path / "t.csv", rows_of())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    packed(write_table(tmp_path / "u.csv", rows_of()), tmp_path / "whole", pictures)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        packed(table, tmp_path / "out", pictures)
    monkeypatch.undo()
    assert shards_of(tmp_path / "out") == {}
    packed(table, tmp_path / "out", pictures)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
