"""Folders of pictures and masks as users have them, and masks of every kind of PNG."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.regions import WHOLE, Window
from dist_siglip.errors import UserError
from dist_siglip.evaluation.patches.label_names import LabelNames, read_label_names
from dist_siglip.evaluation.patches.masked_pictures import (
    MaskedFile,
    MaskedFiles,
    MaskedFolder,
    read_mask,
    see_mask,
)
from tests.support.masked_folders import mask_png, scene, write_scenes
from tests.support.pngs import GREY, PALETTE, RGB, png_of
from tests.support.shards import encode

LABELS = LabelNames({0: "a", 1: "b", 2: "c", 3: "d"}, frozenset({255}))
VALUES = np.array([[0, 1, 2], [3, 2, 1]])


def folder_of(path, classes=None, ignore=None):
    return MaskedFolder(str(path), classes, ignore, name="x")


@pytest.mark.parametrize(
    ("kind", "bits"),
    [(GREY, 2), (GREY, 4), (GREY, 8), (GREY, 16), (PALETTE, 2), (PALETTE, 4), (PALETTE, 8)],
)
def test_the_numbers_in_the_file_are_the_labels(kind, bits):
    found = read_mask(mask_png(VALUES, kind, bits), LABELS.table(), 100)
    assert found.tolist() == VALUES.tolist()


def test_masks_of_one_bit_and_labels_above_255():
    two = LabelNames({0: "a", 1: "b"}, frozenset())
    assert read_mask(mask_png(VALUES % 2, GREY, 1), two.table(), 100).tolist() == [
        [0, 1, 0],
        [1, 0, 1],
    ]
    high = LabelNames({7: "a", 40000: "b"}, frozenset({65535}))
    labels = np.array([[7, 40000, 65535]])
    assert read_mask(mask_png(labels, GREY, 16), high.table(), 100).tolist() == [[0, 1, -1]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (mask_png(np.array([[0, 9], [7, 255]])), "has the label 7, which is neither in classes"),
        (mask_png(np.array([[0, 300]]), GREY, 16), "has the label 300"),
        (png_of(RGB, 8, np.zeros((2, 2, 3), int)), "has colours or transparency"),
        (encode(Image.new("LA", (2, 2))), "has colours or transparency"),
        (encode(Image.new("L", (2, 2)), "JPEG"), "is no PNG"),
        (b"", "no JPEG, PNG or WebP"),
        (mask_png(np.zeros((9, 12), int)), "picture of 12 x 9 pixels, at most 100"),
        (mask_png(np.zeros((9, 9), int))[:-30], "cannot be decoded"),
    ],
)
def test_what_is_no_mask_is_told(data, message):
    with pytest.raises(BadSampleError, match=message) as caught:
        read_mask(data, LABELS.table(), 100)
    assert "\n" not in str(caught.value)


def test_a_mask_is_seen_where_its_picture_is():
    mask = np.arange(24, dtype=np.int16).reshape(4, 6)
    assert see_mask(mask, WHOLE, (4, 6)).tolist() == mask.tolist()
    assert see_mask(mask, WHOLE, (2, 3)).tolist() == mask[1::2, 1::2].tolist()
    assert see_mask(mask, WHOLE, (8, 12)).tolist() == mask.repeat(2, 0).repeat(2, 1).tolist()
    middle = Window(0.0, 1 / 6, 1.0, 5 / 6)
    assert see_mask(mask, middle, (4, 4)).tolist() == mask[:, 1:5].tolist()
    padded = see_mask(mask, Window(-0.25, 0.0, 1.25, 1.0), (6, 6))
    assert padded[1:5].tolist() == mask.tolist()
    assert (padded[[0, 5]] == -1).all()


def write_voc(folder):
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for number in range(3):
        picture, labels = scene(number)
        (folder / f"JPEGImages/2007_{number}.jpg").write_bytes(encode(picture, "JPEG"))
        (folder / f"SegmentationClass/2007_{number}.png").write_bytes(mask_png(labels, PALETTE))
    (folder / "ImageSets/Segmentation/train.txt").write_text("2007_1\n2007_0\n")
    (folder / "ImageSets/Segmentation/val.txt").write_text("2007_2")
    return folder


def test_pascal_voc_is_read_as_it_is(tmp_path):
    voc = folder_of(write_voc(tmp_path))
    train = voc.files(None, "train", "training")
    assert [each.picture.name for each in train] == ["2007_0.jpg", "2007_1.jpg"]
    labels = voc.labels()
    assert len(labels.names) == 21
    assert labels.names[0] == "background"
    assert labels.names[15] == "person"
    found = MaskedFiles(train, labels, 10**6).read(1, PicturePolicy())
    expected = scene(1)[1]
    assert found.mask.tolist() == np.where(expected == 255, -1, expected).tolist()
    assert found.picture.size == (16, 16)
    with pytest.raises(UserError, match=r"Segmentation/test.txt; name one of train, val"):
        voc.files("test")
    (tmp_path / "SegmentationClass/2007_2.png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 files of val.txt, first .*2007_2.png"):
        voc.files("val")


def test_ade20k_is_read_as_it_is(tmp_path):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split / "a").mkdir(parents=True)
        picture, labels = scene(5)
        (tmp_path / f"images/{split}/a/x.jpg").write_bytes(encode(picture, "JPEG"))
        (tmp_path / f"annotations/{split}/a/x.png").write_bytes(mask_png(labels % 255))
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
        "1\t0.1\t1\t1\t1\twall\n2\t0.1\t1\t1\t1\tbuilding, edifice\n3\t0.1\t1\t1\t1\tsky\n"
    )
    ade = folder_of(tmp_path)
    (file,) = ade.files(None, "val", "validation")
    labels = ade.labels()
    assert labels.names == ["wall", "building", "sky"]
    assert labels.ignored == {0, 255}
    found = MaskedFiles([file], labels, 10**6).read(0, PicturePolicy())
    assert found.mask.tolist() == (scene(5)[1] % 255 - 1).tolist()


def test_splits_and_files_that_do_not_fit_are_told(tmp_path):
    write_scenes(tmp_path / "data", (2, 1))
    made = folder_of(tmp_path / "data")
    assert [len(made.files(None, "train")), len(made.files("val"))] == [2, 1]
    with pytest.raises(UserError, match=r"neither SegmentationClass .* nor images/test with"):
        made.files("test")
    with pytest.raises(UserError, match=r"folder \(.*nowhere\) of benchmark 'x' has neither"):
        folder_of(tmp_path / "nowhere").files(None, "train")
    (tmp_path / "data/masks/train/001.png").unlink()
    with pytest.raises(UserError, match=r"no mask for 1 of 2 files, first .*images/train/001.png"):
        made.files("train")
    (tmp_path / "data/images/train/001.png").unlink()
    (tmp_path / "data/images/val/002.png").unlink()
    with pytest.raises(UserError, match=r"no picture for 1 of 1 files, first .*masks/val/002.png"):
        made.files("val")
    (tmp_path / "data/masks/val/002.png").unlink()
    with pytest.raises(UserError, match=r"has no picture in split \(val\)"):
        made.files("val")


def test_names_come_from_lists_texts_and_objects(tmp_path):
    def names(content, file="classes.json", **settings):
        (tmp_path / file).write_text(content)
        return read_label_names(str(tmp_path / file), settings.get("ignore"), tmp_path)

    assert names('["a", "b"]').by_label == {0: "a", 1: "b"}
    assert names('{"3": "a", "1": "b"}').names == ["b", "a"]
    assert names('{"classes": {"3": "a", "1": "b"}}').names == ["b", "a"]
    assert names("{1: a, 2: b, 0: none}", "c.yaml", ignore=[0]).by_label == {1: "a", 2: "b"}
    assert names("a\nb\nc\n", "c.txt").names == ["a", "b", "c"]
    (tmp_path / "classes.txt").write_text("from\nhere\n")
    (tmp_path / "classes.json").unlink()
    assert read_label_names(None, None, tmp_path).names == ["from", "here"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "holds neither a list of names nor an object"),
        ("7", "holds neither a list of names nor an object"),
        ("{", "cannot be read"),
        ('{"a": "b", "c": "d"}', "cannot be read"),
        ('{"-1": "a", "2": "b"}', r"label \(-1\) of a class or in ignore must be 0 to 65535"),
        ('{"0": "a"}', r"classes \(1 beside ignored ones\) must be 2 to 4096"),
        ('["a", ""]', "none of them empty"),
        ("[" * 100_000, "cannot be read"),
        (json.dumps(["n"] * 5000), r"classes \(4999 beside"),
    ],
)
def test_names_that_are_none_are_told(tmp_path, content, message):
    path = tmp_path / "classes.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_label_names(str(path), None, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_names_are_told(tmp_path):
    with pytest.raises(UserError, match=r"classes \(null\) are needed: there is no classes.json"):
        read_label_names(None, None, tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_label_names(str(tmp_path / "none.txt"), None, tmp_path)


@pytest.mark.parametrize(
    ("picture", "mask", "message"),
    [
        (b"no picture", mask_png(VALUES), "p.png picture cannot be decoded"),
        (encode(Image.new("RGB", (3, 2)))[:-40], mask_png(VALUES), "p.png picture cannot be"),
        (encode(Image.new("RGB", (3, 2))), b"no mask", "m.png picture cannot be decoded"),
        (encode(Image.new("RGB", (3, 2))), mask_png(VALUES + 9), "m.png has the label 9"),
        (encode(Image.new("RGB", (2, 3))), mask_png(VALUES), "m.png has 3 x 2 pixels and its"),
        (encode(Image.new("RGB", (3, 2))), None, "m.png No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, picture, mask, message):
    file = MaskedFile(tmp_path / "p.png", tmp_path / "m.png")
    Path(file.picture).write_bytes(picture)
    if mask is not None:
        Path(file.mask).write_bytes(mask)
    with pytest.raises(BadSampleError, match=message) as caught:
        MaskedFiles([file], LABELS, 1000).read(0, PicturePolicy())
    assert "\n" not in str(caught.value)
