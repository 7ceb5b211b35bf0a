import json
import os
import tarfile

import pytest
import torch
from PIL import Image

from dist_siglip.data.index import tar_scan
from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.packing import encode_jpeg, shrink
from dist_siglip.data.packing.table import Columns
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import evaluation_transform
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError
from dist_siglip.metrics import PairEvaluation
from dist_siglip.training.datamodule import ImageTextDataModule
from tests.support.packing import (
    COUNT,
    packed,
    rows_of,
    samples_of,
    shards_of,
    skipped,
    write_table,
)
from tests.support.shards import caption, encode, load_index, picture, tiny_inputs


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


def test_names_with_dots_become_samples_of_their_own(tmp_path):
    images = tmp_path / "in"
    images.mkdir()
    for i in range(3):
        (images / f"img_1.{i}x_0.jpg").write_bytes(encode(picture(i), "JPEG"))
        (images / f"img_1.{i}x_0.txt").write_text(caption(i))
    assert packed(images, tmp_path / "out", None).samples == 3
    assert [s["txt"].decode() for s in samples_of(tmp_path / "out")] == [*map(caption, range(3))]


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


def test_equal_captions_of_several_columns_are_kept_once(tmp_path, pictures):
    rows = [
        {"image": "0.jpg", "caption": "a hen", "alt": " a hen ", "title": "a bird"},
        {"image": "1.jpg", "caption": "a cock", "alt": "a cock", "title": ""},
    ]
    columns = Columns(captions=("caption", "alt", "title"))
    packed(write_table(tmp_path / "table.csv", rows), tmp_path / "out", pictures, columns)
    first, second = samples_of(tmp_path / "out")
    assert json.loads(first["json"]) == {"caption": ["a hen", "a bird"]}
    assert (second["txt"], "json" in second) == (b"a cock", False)


def test_captions_of_one_picture_in_rows_of_their_own_share_its_id(tmp_path, pictures):
    """As a table of COCO has them: six pictures, five rows each."""
    rows = [{"image": f"{i % 6}.jpg", "caption": f"row {i}"} for i in range(30)]
    packed(write_table(tmp_path / "table.csv", rows), tmp_path / "out", pictures)
    data = ImageTextDataModule(
        val_shards=str(tmp_path / "out"), inputs=tiny_inputs(), workers_per_rank=0
    )
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert len(batch.picture_ids.unique()) == 6
    assert len(batch.caption_ids.unique()) == 30
    places = batch.sample_ids % 6
    evaluation = PairEvaluation()
    images = torch.eye(6)[places]
    texts = torch.nn.functional.normalize(images + 0.05 * torch.randn(30, 6), dim=1)
    ids = batch.caption_ids
    evaluation.update(
        images, texts, ids, ids, batch.sample_ids, batch.valid, picture_ids=batch.picture_ids
    )
    metrics = evaluation.compute(logit_scale=10.0, logit_bias=-5.0).metrics
    assert metrics["text_to_image_recall@1"] == metrics["image_to_text_recall@1"] == 1


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
        pictures=PicturePolicy(max_image_pixels=1000),
        captions=CaptionRule(members=("json", "txt"), pick="random"),
    )
    seen = set()
    for i in range(COUNT):
        sample = data[StreamPosition(0, i, i)]
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
    assert EncodedPicture(first["jpg"], PicturePolicy(max_image_pixels=900)).decode().size == (
        45,
        20,
    )


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
    shown = EncodedPicture(sample["jpg"], PicturePolicy(max_image_pixels=10_000)).decode()
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
    assert names == {*shards_of(tmp_path / "whole"), "pack.json", "pack_skipped.jsonl", ".lock"}


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
