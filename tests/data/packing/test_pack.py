import csv
import fcntl
import json
import os
import tarfile
from pathlib import Path

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from webdataset.tariterators import group_by_keys, tar_file_expander

from dist_siglip.data import tar_scan
from dist_siglip.data.captions import CaptionRule
from dist_siglip.data.dataset import PairDataset
from dist_siglip.data.index import load_index
from dist_siglip.data.packing.pack import PackSettings, pack
from dist_siglip.data.packing.sample import encode_jpeg, shrink
from dist_siglip.data.packing.table import Columns
from dist_siglip.data.pairs import build_pair_table
from dist_siglip.data.picture import EncodedPicture
from dist_siglip.data.slot import Slot
from dist_siglip.data.transforms import evaluation_transform
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError
from tests.support.shards import caption, encode, picture, tiny_inputs

COUNT = 23
KINDS = ("JPEG", "PNG", "WEBP")
COLUMNS = Columns()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures, all called .jpg whatever they are."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        (folder / f"{i}.jpg").write_bytes(encode(picture(i, side=24), KINDS[i % 3]))
    return folder


def write_table(path, rows):
    """Write rows (dicts of text, or of lists of text) as what the name of the file says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def rows_of(count=COUNT):
    return [{"image": f"{i}.jpg", "caption": caption(i), "site": f"é{i}"} for i in range(count)]


def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.tar"))}


def samples_of(folder):
    """Read all shards with webdataset, closing them, which its own opener leaves to chance."""
    samples = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            members = tar_file_expander([{"url": str(path), "stream": stream}])
            samples += group_by_keys(members)
    return samples


def packed(table, out, images, columns=COLUMNS, **options):
    arguments = {
        name: options.pop(name)
        for name in ("allow_outside", "max_bad_fraction", "workers")
        if name in options
    }
    settings = PackSettings(**{"samples_per_shard": 5, "columns": columns, **options})
    return pack(table, out, settings, images=images, **arguments)


def skipped(out):
    return [json.loads(line) for line in (out / "pack_skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_shards(tmp_path, pictures, suffix):
    columns = Columns(keep_others=True)
    reference = write_table(tmp_path / "reference.csv", rows_of())
    table = write_table(tmp_path / f"table{suffix}", rows_of())
    packed(reference, tmp_path / "a", pictures, columns)
    report = packed(table, tmp_path / "b", pictures, columns, workers=1)
    assert report == (5, COUNT, COUNT, 0)
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")
    assert len(shards_of(tmp_path / "a")) == 5


def test_shards_are_read_by_the_index_and_by_webdataset(tmp_path, pictures, monkeypatch):
    table = write_table(tmp_path / "table.csv", rows_of())
    packed(table, tmp_path / "out", pictures, Columns(keep_others=True))
    paths = [str(tmp_path / "out" / name) for name in shards_of(tmp_path / "out")]

    def refuse(path, descriptor):
        raise AssertionError("the headers are not plain")

    monkeypatch.setattr(tar_scan, "_scan_with_tarfile", refuse)
    pairs = build_pair_table(paths, image_extensions=("jpg", "png", "webp"))
    assert pairs.num_samples == COUNT
    assert load_index(paths[1]).keys() == [f"{i:09d}" for i in range(5, 10)]
    samples = samples_of(tmp_path / "out")
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(COUNT)]
    for i, sample in enumerate(samples):
        assert sample[("jpg", "png", "webp")[i % 3]] == (pictures / f"{i}.jpg").read_bytes()
        assert sample["txt"].decode() == caption(i)
        assert json.loads(sample["json"]) == {"site": f"é{i}"}


def test_headers_carry_no_time_and_no_pax(tmp_path, pictures):
    packed(write_table(tmp_path / "t.csv", rows_of(3)), tmp_path / "out", pictures)
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        assert {(entry.mtime, len(entry.pax_headers)) for entry in archive} == {(0, 0)}


def test_a_shard_that_has_reached_its_size_is_closed(tmp_path, pictures):
    big = tmp_path / "big"
    big.mkdir()
    for i in range(4):
        (big / f"{i}.jpg").write_bytes(encode(picture(i, side=500)))
    table = write_table(tmp_path / "t.csv", rows_of(4))
    assert packed(table, tmp_path / "out", big, max_shard_mib=1).shards == 2
    assert [len(load_index(str(p)).keys()) for p in (tmp_path / "out").glob("*.tar")] == [2, 2]


def test_shuffling_is_a_permutation_of_the_seed(tmp_path, pictures):
    table = write_table(tmp_path / "t.csv", rows_of())
    keys = {}
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        packed(table, tmp_path / name, pictures, shuffle_seed=seed)
        keys[name] = [sample["__key__"] for sample in samples_of(tmp_path / name)]
    assert keys["a"] == keys["b"] != keys["c"]
    assert sorted(keys["a"]) == sorted(keys["c"]) == [f"{i:09d}" for i in range(COUNT)]
    assert keys["a"] != sorted(keys["a"])


def test_several_captions_go_into_the_json_and_the_first_into_the_text(tmp_path, pictures):
    rows = [{"image": "0.jpg", "short": "a hen", "long": ["a brown hen", " ", "a bird"]}]
    table = write_table(tmp_path / "t.jsonl", rows)
    packed(table, tmp_path / "out", pictures, Columns("image", ("short", "long")))
    (sample,) = samples_of(tmp_path / "out")
    assert sample["txt"] == b"a hen"
    assert json.loads(sample["json"]) == {"caption": ["a hen", "a brown hen", "a bird"]}


def test_a_column_that_the_captions_would_hide_is_refused(tmp_path, pictures):
    rows = [{"image": "0.jpg", "texts": ["a hen", "a bird"], "caption": "kept"}]
    table = write_table(tmp_path / "t.jsonl", rows)
    with pytest.raises(UserError, match="another column named 'caption'"):
        packed(table, tmp_path / "out", pictures, Columns("image", ("texts",), True))


def test_a_folder_needs_no_table(tmp_path):
    for name, side in (("b/1.PNG", 20), ("a.jpg", 21), ("b/notes.md", 0), (".hidden.jpg", 20)):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(encode(picture(side, side=side or 20)))
        path.with_suffix(".txt").write_text(f"caption of {name}")
    report = packed(tmp_path / "in", tmp_path / "out", None)
    assert report == (1, 2, 2, 0)
    samples = samples_of(tmp_path / "out")
    assert [s["txt"] for s in samples] == [b"caption of a.jpg", b"caption of b/1.PNG"]
    (tmp_path / "in" / "a.jpg").write_bytes(b"changed")
    with pytest.raises(UserError, match="table_digest was"):
        packed(tmp_path / "in", tmp_path / "out", None)


def test_captions_of_a_folder_may_be_json(tmp_path):
    texts = {
        "0": {"caption": ["a hen", "", "a bird"], "site": "é"},
        "1": {"caption": "a cock"},
        "2": {"caption": []},
        "3": {"text": "a duck"},
        "4": {"caption": "not this"},
    }
    (tmp_path / "in").mkdir()
    for name, record in texts.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(encode(picture(int(name))))
        (tmp_path / "in" / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "in" / "4.txt").write_text("but this")
    report = packed(tmp_path / "in", tmp_path / "out", None, max_bad_fraction=0.5)
    assert (report.samples, report.skipped) == (3, 2)
    first, second, third = samples_of(tmp_path / "out")
    assert first["txt"] == b"a hen"
    assert json.loads(first["json"]) == {"caption": ["a hen", "a bird"], "site": "é"}
    assert (second["txt"], third["txt"]) == (b"a cock", b"but this")
    assert "json" not in second
    reasons = [record["reason"] for record in skipped(tmp_path / "out")]
    assert reasons == ["caption is empty", "JSON has no field 'caption'"]


def test_packed_shards_train_with_the_pictures_and_captions_of_the_table(tmp_path, pictures):
    rows = [{"image": f"{i}.jpg", "texts": [caption(i), f"other {i}"]} for i in range(COUNT)]
    table = write_table(tmp_path / "t.jsonl", rows)
    packed(table, tmp_path / "out", pictures, Columns("image", ("texts",)))
    pairs = build_pair_table(
        expand_shards(str(tmp_path / "out")),
        image_extensions=("jpg", "png", "webp"),
        caption_extensions=("json", "txt"),
    )
    data = PairDataset(
        pairs,
        evaluation_transform(tiny_inputs()),
        seed=0,
        max_image_pixels=1000,
        captions=CaptionRule(members=("json", "txt"), pick="random"),
    )
    seen = set()
    for i in range(COUNT):
        sample = data[Slot(0, i, i)]
        shown = Image.open(pictures / f"{i}.jpg").convert("RGB")
        assert torch.equal(sample.image, evaluation_transform(tiny_inputs())(shown))
        assert sample.caption in rows[i]["texts"]
        assert not sample.is_substitute
        seen.add(sample.caption.split()[0])
    assert seen == {"pair", "other"}


def test_only_larger_pictures_are_made_smaller(tmp_path):
    images = tmp_path / "in"
    images.mkdir()
    wide = Image.new("RGB", (90, 40), "red")
    small = encode(picture(1, side=20))
    (images / "0.jpg").write_bytes(encode(wide))
    (images / "1.jpg").write_bytes(small)
    table = write_table(tmp_path / "t.csv", rows_of(2))
    packed(table, tmp_path / "out", images, resize_short_side=20, jpeg_quality=80)
    first, second = samples_of(tmp_path / "out")
    assert second["png"] == small
    assert first["jpg"] == encode_jpeg(wide.resize((45, 20), Image.Resampling.BICUBIC), 80)
    assert EncodedPicture(first["jpg"], max_pixels=900).decode().size == (45, 20)


@pytest.mark.parametrize("size", [(640, 480), (481, 1000), (7, 3000), (20, 20)])
def test_the_short_side_is_exact_and_the_shape_is_kept(size):
    width, height = shrink(Image.new("RGB", size), 7).size
    assert min(width, height) == 7
    assert width / height == pytest.approx(size[0] / size[1], rel=0.08)


def test_orientation_is_ignored_as_in_training(tmp_path):
    images = tmp_path / "in"
    images.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(0, side=40).resize((60, 40)).save(images / "0.jpg", exif=exif)
    table = write_table(tmp_path / "t.csv", rows_of(1))
    packed(table, tmp_path / "out", images, resize_short_side=20)
    (sample,) = samples_of(tmp_path / "out")
    shown = EncodedPicture(sample["jpg"], max_pixels=10_000).decode()
    assert shown.size == (30, 20)
    assert not shown.getexif()


class KilledError(BaseException):
    """Nothing catches it, as nothing catches a signal."""


class DiesAtCall:
    """Stands in for ``os.fsync`` and dies at one of its calls."""

    def __init__(self, number):
        self._left = number

    def __call__(self, descriptor):
        self._left -= 1
        if not self._left:
            raise KilledError


@pytest.mark.parametrize("kills", [1, 2, 3])
def test_packing_goes_on_where_it_stopped_with_the_same_bytes(
    tmp_path, pictures, monkeypatch, kills
):
    rows = rows_of()
    rows[6]["image"] = rows[14]["image"] = "missing.jpg"
    table = write_table(tmp_path / "t.csv", rows)
    packed(table, tmp_path / "whole", pictures, max_bad_fraction=0.2)

    for kill in range(kills):  # while a shard is synced, a shard further each time
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", DiesAtCall(4 if kill else 6))
            with pytest.raises(KilledError):
                packed(table, tmp_path / "out", pictures, max_bad_fraction=0.2, workers=1 + kill)
    assert len(shards_of(tmp_path / "out")) < 5
    packed(table, tmp_path / "out", pictures, max_bad_fraction=0.2)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
    assert skipped(tmp_path / "out") == skipped(tmp_path / "whole")
    assert [record["row"] for record in skipped(tmp_path / "out")] == [6, 14]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*shards_of(tmp_path / "whole"), "pack.json", "pack_skipped.jsonl"}


def test_packing_twice_changes_nothing(tmp_path, pictures):
    table = write_table(tmp_path / "t.csv", rows_of())
    report = packed(table, tmp_path / "out", pictures)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert packed(table, tmp_path / "out", pictures) == report
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, pictures):
    table = write_table(tmp_path / "t.csv", rows_of())
    for workers in (1, 2, 5):
        packed(table, tmp_path / str(workers), pictures, workers=workers, resize_short_side=16)
    assert shards_of(tmp_path / "1") == shards_of(tmp_path / "2") == shards_of(tmp_path / "5")


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
    with (tmp_path / "out" / "pack_skipped.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being written by another process"):
            packed(table, tmp_path / "out", pictures)


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
        packed(table, tmp_path / "out", images, max_image_pixels=80_000, max_bad_fraction=0.5)
    report = packed(table, tmp_path / "out", images, max_image_pixels=80_000, max_bad_fraction=1)
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
