import io
import json
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from sklearn.datasets import load_digits

import dist_siglip.models
from dist_siglip.data import RegionRule
from dist_siglip.data.handwriting import (
    compose_with_boxes,
    number_in_words,
    write_handwriting_shards,
)
from dist_siglip.errors import UserError

SMALL = {"num_train_pairs": 101, "num_val_pairs": 20, "num_train_shards": 4}
WORDS = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "thirteen": 13,
    "fourteen": 14,
    "fifteen": 15,
    "sixteen": 16,
    "seventeen": 17,
    "eighteen": 18,
    "nineteen": 19,
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
CONFIG = Path(dist_siglip.models.__file__).with_name("handwriting.json")


def read_words(caption):
    """Add up the words, left to right: the reference that knows nothing of how they were made."""
    total = part = 0
    for word in caption.split():
        if word == "thousand":
            total, part = total + part * 1000, 0
        elif word == "hundred":
            part *= 100
        else:
            part += WORDS[word]
    return total + part


def read_pairs(paths):
    """Read (key, picture, caption, facts) of every sample with the standard library."""
    pairs = []
    for path in paths:
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        for (key_a, facts), (key_b, png), (key_c, text) in zip(*[iter(members)] * 3, strict=True):
            stem = key_a.removesuffix(".json")
            assert (key_b, key_c) == (f"{stem}.png", f"{stem}.txt")
            pairs.append((stem, Image.open(io.BytesIO(png)), text.decode(), json.loads(facts)))
    return pairs


def read_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_handwriting_shards(tmp_path_factory.mktemp("handwriting"), **SMALL)


@pytest.mark.parametrize("num_digits", [1, 2, 3, 4])
def test_words_read_back_as_the_number(num_digits):
    for value in range(10 ** (num_digits - 1), 10**num_digits):
        assert read_words(number_in_words(value, num_digits)) == value


@pytest.mark.parametrize("value", [10_000, 12_013, 340_000, 700_001, 999_999])
def test_words_of_large_numbers_read_back(value):
    assert read_words(number_in_words(value, len(str(value)))) == value


@pytest.mark.parametrize(("value", "num_digits"), [(999, 4), (10_000, 4), (0, 1), (5, 0), (1, 7)])
def test_words_refuse_another_number_of_digits(value, num_digits):
    with pytest.raises(UserError, match=r"use"):
        number_in_words(value, num_digits)


def test_pairs_are_spread_over_the_shards(shards):
    assert [len(read_pairs([path])) for path in shards.train] == [26, 25, 25, 25]
    assert [len(read_pairs([path])) for path in shards.val] == [20]


def test_keys_are_unique(shards):
    keys = [key for key, *_ in read_pairs(shards.train + shards.val)]
    assert len(set(keys)) == len(keys) == 121


def test_caption_number_digits_and_handwriting_agree(shards):
    classes = load_digits().target
    for _, _, caption, facts in read_pairs(shards.train + shards.val):
        assert read_words(caption) == facts["number"]
        assert [int(digit) for digit in str(facts["number"])] == facts["digits"]
        assert classes[facts["handwriting"]].tolist() == facts["digits"]


def test_pictures_are_rgb_of_the_size_asked_for(tmp_path, shards):
    assert {(p.size, p.mode) for _, p, *_ in read_pairs(shards.train)} == {((64, 64), "RGB")}
    smaller = write_handwriting_shards(tmp_path, **SMALL, image_size=48, digits_per_image=3)
    assert {(p.size, p.mode) for _, p, *_ in read_pairs(smaller.val)} == {((48, 48), "RGB")}


def test_no_validation_handwriting_or_number_occurs_in_training(tmp_path):
    shards = write_handwriting_shards(
        tmp_path, num_train_pairs=1500, num_val_pairs=400, num_train_shards=2
    )
    train, val = ([facts for *_, facts in read_pairs(p)] for p in (shards.train, shards.val))
    rows = [{row for facts in part for row in facts["handwriting"]} for part in (train, val)]
    assert not rows[0] & rows[1]
    # 6,000 draws among 1,438 rows and 1,600 among 359 see nearly every row of their split.
    assert 1380 < len(rows[0]) <= 1440
    assert 335 < len(rows[1]) <= 362
    numbers = [[facts["number"] for facts in part] for part in (train, val)]
    assert not set(numbers[0]) & set(numbers[1])
    assert len(set(numbers[1])) == 400


def test_equal_arguments_give_equal_bytes(tmp_path):
    for name in "ab":
        write_handwriting_shards(tmp_path / name, **SMALL, seed=3)
    first = read_bytes(tmp_path / "a")
    assert first == read_bytes(tmp_path / "b")
    assert sorted(first) == [
        "manifest.json",
        *[f"train-{shard:05d}.tar" for shard in range(4)],
        "val-00000.tar",
    ]


def test_another_seed_gives_other_pictures_numbers_and_split(tmp_path, shards):
    others = write_handwriting_shards(tmp_path, **SMALL, seed=1)
    here, there = read_pairs(shards.val), read_pairs(others.val)
    assert [facts["number"] for *_, facts in here] != [facts["number"] for *_, facts in there]
    train_rows = {row for *_, facts in read_pairs(shards.train) for row in facts["handwriting"]}
    assert train_rows & {row for *_, facts in there for row in facts["handwriting"]}


def test_a_complete_folder_is_left_untouched(tmp_path):
    first = write_handwriting_shards(tmp_path, **SMALL)
    before = {path: path.stat() for path in tmp_path.iterdir()}
    assert write_handwriting_shards(tmp_path, **SMALL) == first
    assert {path: path.stat() for path in tmp_path.iterdir()} == before


def test_other_arguments_are_refused_and_nothing_changes(tmp_path):
    write_handwriting_shards(tmp_path, **SMALL)
    before = read_bytes(tmp_path)
    with pytest.raises(UserError) as error:
        write_handwriting_shards(tmp_path, **{**SMALL, "num_val_pairs": 21}, seed=5)
    for part in (str(tmp_path), "num_val_pairs is 20 there and 21", "seed is 0 there and 5"):
        assert part in str(error.value)
    assert "choose another folder" in str(error.value)
    assert "\n" not in str(error.value)
    assert read_bytes(tmp_path) == before


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"recipe": 1, "shards": []}'])
def test_a_strange_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest of handwriting shards"):
        write_handwriting_shards(tmp_path, **SMALL)


@pytest.mark.parametrize("lost", [["manifest.json"], ["train-00002.tar"], ["val-00000.tar"]])
def test_an_incomplete_folder_is_completed(tmp_path, lost):
    write_handwriting_shards(tmp_path, **SMALL)
    before = read_bytes(tmp_path)
    for name in lost:
        (tmp_path / name).unlink()
    write_handwriting_shards(tmp_path, **SMALL)
    assert read_bytes(tmp_path) == before


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        write_handwriting_shards(tmp_path / "file", **SMALL)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"digits_per_image": 1}, "digits_per_image"),
        ({"digits_per_image": 7}, "digits_per_image"),
        ({"image_size": 31}, "image_size"),
        ({"image_size": 1025}, "image_size"),
        ({"num_val_pairs": 0}, "num_val_pairs"),
        ({"num_val_pairs": 9000}, "num_val_pairs"),
        ({"num_train_shards": 0}, "num_train_shards"),
        ({"num_train_pairs": 3}, "num_train_shards"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, change, name):
    with pytest.raises(UserError, match=rf"^{name} \("):
        write_handwriting_shards(tmp_path / "new", **{**SMALL, **change})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", range(4))
def test_a_digit_is_drawn_in_its_own_cell(place):
    ink = np.zeros((64, 4, 8, 8), np.float32)
    ink[:, place] = 1.0
    pictures = compose_with_boxes(ink, 48, np.random.default_rng(0))[0].mean(axis=-1)
    paper = np.median(pictures, axis=(1, 2), keepdims=True)
    dark = paper - pictures > 20
    column = (dark * np.arange(48)).sum(axis=(1, 2)) / dark.sum(axis=(1, 2))
    assert np.all(np.abs(column - (12 * place + 5.5)) < 3)


def test_a_digit_is_stretched_as_bilinear_interpolation_by_hand():
    digit = np.random.default_rng(1).random((8, 8)).astype(np.float32)
    ink = np.stack([digit, np.zeros_like(digit)])[None]
    picture = compose_with_boxes(ink, 32, FixedGenerator())[0][0, :, :, 0]
    # Cell 16, no jitter: the digit covers columns 0 to 16 and rows 8 to 24, two pixels a sample.
    for row in range(8, 24):
        for column in range(16):
            y, x = (row - 8 + 0.5) / 2 - 0.5, (column + 0.5) / 2 - 0.5
            value = 0.0
            for i in range(8):
                for j in range(8):
                    value += max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * float(digit[i, j])
            assert abs(int(picture[row, column]) - (200 - 150 * value)) <= 0.51
    assert np.all(picture[:6] == 200)
    assert np.all(picture[:, 18:] == 200)


class FixedGenerator:
    """Stands in for the random generator: no jitter, paper 200, pen 50, no noise."""

    def uniform(self, low, high, shape):
        value = {150: 200.0, 0: 50.0}.get(low, 1.0 if low > 0 else 0.0)
        return np.full(shape, value)

    def standard_normal(self, shape, dtype):
        return np.zeros(shape, dtype)


@pytest.fixture(scope="module")
def towers():
    open_clip.add_model_config(CONFIG)
    return open_clip.create_model("handwriting"), open_clip.get_tokenizer("handwriting")


def normalised(picture, preprocess):
    """The pixels as they are in the file, for a model of the same size must not resize them."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(preprocess[name])[:, None, None] for name in ("mean", "std"))
    return (pixels - mean) / std


def test_model_config_fits_the_pictures_and_captions(shards, towers):
    model, tokenizer = towers
    pairs = read_pairs(shards.val)
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    images = torch.stack([preprocess(picture) for _, picture, *_ in pairs])
    assert torch.equal(images[0], normalised(pairs[0][1], model.visual.preprocess_cfg))
    image_features = model.eval().encode_image(images)
    text_features = model.encode_text(tokenizer([caption for _, _, caption, _ in pairs]))
    assert image_features.shape == text_features.shape
    assert len(image_features) == 20
    assert image_features.std(dim=0).min() > 0
    assert text_features.std(dim=0).min() > 0


def test_every_caption_fits_the_context(towers):
    _, tokenizer = towers
    captions = [number_in_words(value, 4) for value in range(1000, 10000)]
    last = tokenizer(captions)[:, -1]
    assert (last == 0).all()


def test_boxes_enclose_the_ink_of_each_digit():
    """Of a digit with ink in a part of its samples; one sample blurs half over each edge."""
    ink = np.zeros((16, 4, 8, 8), np.float32)
    ink[..., 2:7, 1:6] = 1.0
    pictures, boxes = compose_with_boxes(ink, 96, np.random.default_rng(2))
    grey = pictures.mean(axis=-1)
    paper, pen = np.median(grey, axis=(1, 2)), grey.min(axis=(1, 2))
    for picture, middle, places in zip(grey, (paper + pen) / 2, boxes * 96, strict=True):
        for place, (top, left, bottom, right) in enumerate(places):
            cell = slice(24 * place, 24 * place + 24)
            rows, columns = np.nonzero(picture[:, cell] < middle)
            found = [rows.min(), 24 * place + columns.min()]
            found += [rows.max() + 1, 24 * place + columns.max() + 1]
            assert np.abs(np.array(found) - [top, left, bottom, right]).max() < 1.5


def test_regions_are_written_beside_what_is_written_without_them(tmp_path, shards):
    settings = {**SMALL, "regions": True}
    written = write_handwriting_shards(tmp_path, **settings)
    assert write_handwriting_shards(tmp_path, **settings) == written
    number_of_regions = set()
    for ours, theirs in zip(read_pairs(written.val), read_pairs(shards.val), strict=True):
        regions = ours[3].pop("regions")
        assert ours[0] == theirs[0]
        assert ours[1].tobytes() == theirs[1].tobytes()
        assert ours[2:] == theirs[2:]
        digits = ours[3]["digits"]
        single = [digit for digit in digits if digits.count(digit) == 1]
        assert [{**WORDS, "zero": 0}[region["text"]] for region in regions] == single
        number_of_regions.add(len(regions))
        lefts = [region["box"][1] for region in regions]
        assert lefts == sorted(lefts)
        assert len(RegionRule(json_field="regions").read({"regions": regions})) == len(single)
    assert max(number_of_regions) == 4 > min(number_of_regions)
    with pytest.raises(UserError, match="regions is True there and False was asked for"):
        write_handwriting_shards(tmp_path, **SMALL)
    with pytest.raises(UserError, match="regions is False there and True was asked for"):
        write_handwriting_shards(Path(shards.val[0]).parent, **settings)
