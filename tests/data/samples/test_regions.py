"""Regions: what is read, refused and drawn, and boxes that stay on what they enclose."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from dist_siglip.data import PairCollator, PairDataset, RandomFlip, RegionRule, StreamPosition
from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.dataset import seeded_generators
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.regions import MAX_REGIONS, NO_REGION, WHOLE, Region, Window
from dist_siglip.data.samples.stages import run_stages
from dist_siglip.data.samples.transforms import evaluation_transform, training_transform
from dist_siglip.errors import UserError
from tests.support.shards import caption, encode, jpeg, tiny_inputs, tokenize, write_shard

RULE = RegionRule(json_field="regions")
BOX = (0.3, 0.5, 0.6, 0.7)
SIZE = (160, 100)


def spot(box=BOX, size=SIZE):
    """A black picture with a white box."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    top, bottom = (round(each * height) for each in box[::2])
    left, right = (round(each * width) for each in box[1::2])
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


def box_of(pixels):
    """Where (3, H, W) pixels are white, in shares."""
    is_white = pixels[0] > 127
    found = []
    for axis, length in ((1, pixels.shape[1]), (0, pixels.shape[2])):
        places = is_white.any(dim=axis).nonzero().flatten()
        found.append((places[0].item() / length, (places[-1].item() + 1) / length))
    return found[0][0], found[1][0], found[0][1], found[1][1]


def read(regions, rule=RULE):
    return rule.read({"regions": regions})


def test_regions_without_text_or_of_a_low_score_are_passed_over():
    found = read(
        [
            {"text": " a fox ", "box": [0, 0.25, 0.5, 1]},
            {"text": "", "box": [0, 0, 1, 1]},
            {"text": "a hen", "box": [0, 0, 1, 1], "score": 0.29},
            {"text": "a bird", "box": [-0.005, 0, 1.001, 1], "score": 0.3, "other": 1},
        ]
    )
    assert found == [Region("a fox", (0, 0.25, 0.5, 1)), Region("a bird", (0, 0, 1, 1))]
    assert read(None) == read([]) == RULE.read({}) == []
    nested = RegionRule(json_field="detector.found", min_score=-5)
    record = {"detector": {"found": [{"text": "x", "box": [0, 0, 1, 1], "score": -4}]}}
    assert nested.read(record) == [Region("x", (0, 0, 1, 1))]
    assert RegionRule().read(record) == []


def of_box(*box, **fields):
    return [{"text": "a fox", "box": list(box), **fields}]


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        (of_box(10, 20, 100, 200), r"\[10, 20, 100, 200\]\) is not in the picture; .* 0 to 1"),
        (of_box(0, 0, 1, float("nan")), "is not in the picture"),
        (of_box(0, 0, 1, float("inf")), "is not in the picture"),
        (of_box(0, 0, 1, 10**400), "is not in the picture"),
        (of_box(0.5, 0, 0.25, 1), "encloses nothing"),
        (of_box(0.5, 0, 0.5, 1), "encloses nothing"),
        (of_box(1.001, 0, 1.002, 1), "encloses nothing"),
        (of_box(0, 0, 1), "is not four numbers"),
        (of_box(0, 0, 1, True), "is not four numbers"),
        (of_box(0, 0, 1, "1"), "is not four numbers"),
        (of_box(0, 0, 1, 1, score=float("nan")), "the score of a region"),
        (of_box(0, 0, 1, 1, score="high"), "the score of a region"),
        ([{"text": "a fox"}], r"the box of a region \(None\)"),
        ([{"box": [0, 0, 1, 1]}], "'regions.text' holds a NoneType"),
        ([{"text": "\ud800", "box": [0, 0, 1, 1]}], "half a character"),
        (["a fox"], "a region is a str, not an object"),
        ({"a fox": [0, 0, 1, 1]}, "holds a dict, not a list of regions"),
        (of_box(0, 0, 1, 1) * (MAX_REGIONS + 1), "1001 regions, at most 1000"),
    ],
)
def test_regions_that_make_no_sense_are_bad_samples(regions, words):
    with pytest.raises(BadSampleError, match=words) as caught:
        read(regions)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"json_field": ""}, "regions.json_field"),
        ({"min_left": 0.0}, "regions.min_left"),
        ({"min_left": float("nan")}, "regions.min_left"),
        ({"min_score": float("nan")}, "regions.min_score"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        RegionRule(**settings).check()


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("image_size", [64, (48, 64), (64, 40)])
@pytest.mark.parametrize("size", [SIZE, (100, 160), (101, 37)])
def test_boxes_go_through_the_evaluation_with_the_pixels(resize_mode, image_size, size):
    inputs = replace(tiny_inputs(), resize_mode=resize_mode, image_size=image_size)
    box = (0.4, 0.4, 0.6, 0.7)
    pixels, window = evaluation_transform(inputs).with_window(spot(box, size))
    moved, left = window.move(box)
    assert moved == pytest.approx(box_of(pixels), abs=1.6 / min(pixels.shape[1:]))
    assert left > 0.6
    again = window.place(window.move((0.45, 0.5, 0.5, 0.55))[0])
    assert again == pytest.approx((0.45, 0.5, 0.5, 0.55))


def test_boxes_go_through_random_crops_with_the_pixels():
    """Of pictures, and of encoded ones that are decoded at a fraction and turned upright."""
    inputs = replace(tiny_inputs(), image_size=64)
    transform = training_transform(inputs, (0.3, 0.9))
    turned = Image.Exif()
    turned[274] = 6  # a quarter to the right
    big = spot(size=(640, 400))
    data = jpeg(big.rotate(90, expand=True), exif=turned)
    policy = PicturePolicy(exif_orientation="apply", max_image_pixels=10**7)
    moves = set()
    for key in range(20):
        for picture in (spot(), EncodedPicture(data, policy)):
            with seeded_generators(key):
                pixels, window = transform.with_window(picture)
            moved, left = window.move(BOX)
            if left > 0.2:
                assert moved == pytest.approx(box_of(pixels), abs=0.04)
                moves.add(moved)
    assert len(moves) > 20
    # A box that stayed where it was would be noticed.
    assert max(abs(moved[0] - BOX[0]) for moved in moves) > 0.1


def test_a_flip_moves_boxes_and_a_box_left_behind_is_noticed():
    sample = {
        "__key__": "k",
        "__url__": "s",
        "text": "a fox",
        "image": spot(),
        "regions": of_box(*BOX),
    }
    found = run_stages([RandomFlip(1.0)], sample)
    seen = box_of(torch.from_numpy(np.array(found["image"])).permute(2, 0, 1))
    assert found["regions"][0]["box"] == pytest.approx(seen)
    assert abs(seen[1] - BOX[1]) > 0.1
    for words in ({"text": "the left fox"}, {"regions": of_box(*BOX, text="Rightmost fox")}):
        same = run_stages([RandomFlip(1.0)], {**sample, **words})
        assert same["image"] is sample["image"]
    flips = []
    for key in range(40):
        with seeded_generators(key):
            flips.append(run_stages([RandomFlip()], sample)["image"] is not sample["image"])
    assert 10 < sum(flips) < 30
    with pytest.raises(UserError, match=r"probability \(1.5\) of RandomFlip"):
        RandomFlip(1.5)


def test_a_stage_that_may_have_moved_pixels_is_refused_in_one_line():
    sample = {"__key__": "k", "__url__": "s", "text": "a fox", "image": spot()}
    turn = webdataset.map_dict(image=lambda image: image.rotate(90))
    assert run_stages([turn], sample)  # without regions any stage will do
    sample["regions"] = of_box(*BOX)
    with pytest.raises(UserError, match="does not say whether its pixels move; ") as caught:
        run_stages([turn], sample)
    assert "\n" not in str(caught.value)

    class Darken:
        moves_regions = False

        def __call__(self, samples):
            for each in samples:
                yield {**each, "image": each["image"].point(lambda value: value // 2)}

    louder = webdataset.map_dict(text=str.upper)
    found = run_stages([Darken(), louder], sample)
    assert found["regions"] == sample["regions"]
    with pytest.raises(UserError, match="must leave the list under 'regions'"):
        run_stages([webdataset.map(lambda each: {"text": "x", "image": each["image"]})], sample)


def test_one_region_is_drawn_of_those_of_which_enough_is_left():
    regions = [Region(name, (0, left, 1, left + 0.2)) for name, left in (("a", 0), ("b", 0.7))]
    window = Window(0, 0.11, 1, 0.81)  # less than half of a, more than half of b
    for key in range(9):
        region = RULE.choose(regions, window, (key,))
        assert region.text == "b"
        assert region.box == pytest.approx((0, 0.59 / 0.7, 1, 1))
    strict = replace(RULE, min_left=0.9)
    assert strict.choose(regions, window, (0,)) is NO_REGION
    assert RULE.choose([], WHOLE, (0,)) is NO_REGION
    draws = [RULE.choose(regions, WHOLE, (3, key)).text for key in range(200)]
    assert 70 < draws.count("a") < 130
    assert draws == [RULE.choose(regions, WHOLE, (3, key)).text for key in range(200)]


RECORDS = (
    {"regions": of_box(0.5, 0.5, 1, 1) + of_box(0, 0, 0.5, 0.5, text="a hen")},
    {"regions": of_box(5, 5, 9, 9)},
    {},
    {"regions": []},
    None,
)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    members = []
    for number, record in enumerate(RECORDS):
        parts = {"png": encode(spot()), "txt": caption(number).encode()}
        if record is not None:
            parts["json"] = json.dumps(record).encode()
        members.append((f"{number:06d}", parts))
    return str(write_shard(tmp_path_factory.mktemp("shards") / "0.tar", members))


def table_of(shard, **options):
    return build_pair_table([shard], name="train_shards", image_extensions=("png",), **options)


def dataset_of(shard, rule=RULE, **options):
    table = table_of(shard, other_extensions=("json",))
    return PairDataset(
        table,
        options.pop("transform", evaluation_transform(tiny_inputs())),
        seed=0,
        pictures=PicturePolicy(),
        regions=rule,
        **options,
    )


def at(sample_id, epoch=0):
    return StreamPosition(epoch, sample_id, sample_id)


def test_a_batch_has_a_region_of_each_picture_or_none(shard, tmp_path):
    log = tmp_path / "bad.jsonl"
    dataset = dataset_of(shard, bad_sample_log=str(log))
    samples = [dataset[at(number)] for number in range(5)]
    assert [each.is_substitute for each in samples] == [False, True, False, False, False]
    assert "is not in the picture" in log.read_text()
    batch = PairCollator(tokenize)(samples)
    assert batch.region_boxes.shape == (5, 4)
    assert batch.region_boxes.dtype == torch.float32
    assert batch.region_texts.shape == (5, 24)
    has_region = batch.region_boxes[:, 2] > 0
    assert has_region[[0, 2, 3, 4]].tolist() == [True, False, False, False]
    boxes = {
        tokenize([text])[0].sum().item(): box
        for text, box in (
            ("a fox", [0.5, 0.5, 1, 1]),
            ("a hen", [0, 0, 0.5, 0.5]),
        )
    }
    assert batch.region_boxes[0].tolist() == boxes[batch.region_texts[0].sum().item()]
    texts = {dataset[at(0, epoch)].region.text for epoch in range(9)}
    assert texts == {"a fox", "a hen"}
    without = PairCollator(tokenize)(
        [dataset_of(shard, RegionRule())[at(number)] for number in (0, 1)]
    )
    assert without.region_boxes is without.region_texts is None
    # What is drawn beside the region is what it was.
    assert [each.draw for each in samples] == [
        dataset_of(shard, RegionRule())[at(number)].draw for number in range(5)
    ]


def test_regions_of_a_sample_go_through_stages_and_crop(shard):
    flipped = dataset_of(shard, stages=[RandomFlip(1.0)])
    boxes = {flipped[at(0, epoch)].region for epoch in range(9)}
    assert boxes == {Region("a fox", (0.5, 0, 1, 0.5)), Region("a hen", (0, 0.5, 0.5, 1))}
    cropped = dataset_of(shard, transform=training_transform(tiny_inputs(), (0.2, 0.5)))
    regions = [cropped[at(0, epoch)].region for epoch in range(20)]
    assert regions == [cropped[at(0, epoch)].region for epoch in range(20)]
    assert len({region.box for region in regions}) > 10

    class Lost:
        moves_regions = True

        def __call__(self, samples):
            for each in samples:
                yield {**each, "regions": of_box(3, 4, 5, 6)}

    with pytest.raises(UserError, match="20 substitutes are all bad"):
        dataset_of(shard, stages=[Lost()])[at(0)]


def test_what_regions_cannot_be_read_from_is_refused(shard):
    table = table_of(shard)
    with pytest.raises(UserError, match="needs a table that knows"):
        PairDataset(
            table,
            evaluation_transform(tiny_inputs()),
            seed=0,
            pictures=PicturePolicy(),
            regions=RULE,
        )
    with pytest.raises(UserError, match="needs to know what the transform"):
        dataset_of(shard, transform=lambda picture: torch.zeros(3, 16, 16))
    with pytest.raises(UserError, match="cannot follow stored augmentations; leave out"):
        dataset_of(shard, reinforced=object())


def test_a_huge_json_is_a_bad_sample(tmp_path):
    many = json.dumps({"regions": of_box(0, 0, 1, 1) * 30_000}).encode()
    assert len(many) > 1 << 20
    parts = {"png": encode(spot()), "txt": b"x", "json": many}
    path = write_shard(tmp_path / "0.tar", [("a", parts)])
    with pytest.raises(UserError, match="all bad"):
        dataset_of(str(path))[at(0)]
