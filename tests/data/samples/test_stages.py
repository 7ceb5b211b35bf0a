import pickle
import random

import numpy as np
import pytest
import webdataset
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.dataset import seeded_generators
from dist_siglip.data.samples.regions import RegionRule
from dist_siglip.data.samples.stages import (
    ColorJitter,
    FilteredError,
    RandAugment,
    RandomAffine,
    RandomFlip,
    TimmAugment,
    all_take_rgb,
    check_stages,
    names_of_changing,
    outside_of_training,
    run_stages,
)
from dist_siglip.errors import UserError
from dist_siglip.training.datamodule import ImageTextDataModule
from tests.support.shards import photo, picture


def sample(text="a fox"):
    return {"__key__": "k", "__url__": "s.tar", "image": picture(1), "text": text}


def run(*stages, **fields):
    return run_stages(stages, sample(**fields))


def upper(fields):
    return {**fields, "text": f" {fields['text'].upper()} "}


def test_stages_of_webdataset_change_a_sample_one_after_another():
    stages = (
        webdataset.map(upper),
        webdataset.map_dict(text=lambda text: text.replace("FOX", "HEN")),
        webdataset.select(lambda fields: "HEN" in fields["text"]),
    )
    assert run(*stages)["text"] == "A HEN"


def test_a_class_with_a_call_is_a_stage():
    class Suffix:
        def __init__(self, suffix):
            self.suffix = suffix

        def __call__(self, samples):
            for fields in samples:
                yield {**fields, "text": fields["text"] + self.suffix}

    assert run(Suffix("!"), Suffix("?"))["text"] == "a fox!?"


def test_a_sample_that_is_left_out_names_the_stage():
    with pytest.raises(FilteredError, match="left out by stage none_at_all"):
        run(none_at_all)


def none_at_all(samples):
    for _ in samples:
        pass
    return iter(())


def twice(samples):
    for fields in samples:
        yield fields
        yield fields


def without_text(samples):
    for fields in samples:
        yield {"image": fields["image"]}


def array_for_picture(samples):
    for fields in samples:
        yield {**fields, "image": np.asarray(fields["image"])}


def number(samples):
    yield 7


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (twice, "stage twice makes 2 samples of one"),
        (without_text, "stage without_text must leave a string under 'text', not NoneType"),
        (array_for_picture, "must leave a PIL.Image under 'image', not ndarray"),
        (number, "must leave a PIL.Image under 'image'"),
    ],
)
def test_a_stage_that_breaks_the_sample_is_named(stage, message):
    with pytest.raises(UserError, match=message):
        run(stage)


def test_a_defect_in_a_stage_is_not_a_bad_sample():
    def broken(samples):
        for fields in samples:
            yield {**fields, "text": fields["no such field"]}

    with pytest.raises(RuntimeError, match=r"broken fails on s\.tar/k: KeyError") as info:
        run(broken)
    assert isinstance(info.value.__cause__, KeyError)


def test_a_stage_may_call_a_sample_bad():
    def picky(samples):
        for _ in samples:
            raise BadSampleError("too dark")
        yield

    with pytest.raises(BadSampleError, match="too dark"):
        run(picky)
    with pytest.raises(BadSampleError, match="caption is empty"):
        run(webdataset.map(lambda fields: {**fields, "text": " "}))


def test_pictures_come_out_in_rgb():
    grey = webdataset.map(lambda fields: {**fields, "image": fields["image"].convert("L")})
    assert run(grey)["image"].mode == "RGB"
    assert isinstance(run()["image"], Image.Image)


def seeing(seen, mode=None):
    """A stage that notes the mode of its pictures."""

    def stage(samples):
        for fields in samples:
            seen.append(fields["image"].mode)
            yield fields

    if mode is not None:
        stage.picture_mode = mode
    return stage


def half_transparent():
    image = Image.new("LA", (8, 8), (255, 255))
    image.paste((0, 0), (0, 0, 4, 8))
    return image


def test_a_stage_gets_pictures_in_the_mode_it_asks_for():
    seen = []
    stages = [seeing(seen, "stored"), seeing(seen, "RGBA"), seeing(seen), seeing(seen, "RGB")]
    check_stages(stages)
    found = run_stages(stages, {**sample(), "image": half_transparent()}, "#102030")["image"]
    assert seen == ["LA", "RGBA", "RGB", "RGB"]
    assert [found.getpixel((x, 0)) for x in (0, 7)] == [(16, 32, 48), (255, 255, 255)]
    assert all_take_rgb([seeing(seen)])
    assert not all_take_rgb(stages)


def test_what_a_stage_leaves_transparent_is_laid_on_the_ground():
    stage = webdataset.map(lambda fields: {**fields, "image": Image.new("RGBA", (4, 4))})
    assert run_stages([stage], sample(), "#102030")["image"].getpixel((0, 0)) == (16, 32, 48)


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (("RGB", "RGBA"), "asks for pictures in mode RGBA after a stage that gets them in RGB"),
        ((None, "stored"), "mode stored after a stage that gets them in RGB"),
        (("CMYK",), r"picture_mode \(CMYK\) of stage .* must be one of stored, RGBA, RGB"),
    ],
)
def test_a_mode_that_is_lost_or_unknown_is_refused(modes, message):
    with pytest.raises(UserError, match=message):
        check_stages([seeing([], mode) for mode in modes])


AUGMENTATIONS = [
    RandomFlip(),
    ColorJitter(grey=0.2),
    RandAugment(),
    RandomAffine(10.0, 0.1, (0.8, 1.2), (255, 255, 255)),
    TimmAugment(),
    TimmAugment("augmix-m3-w2"),
    TimmAugment("3a"),
]


@pytest.mark.parametrize("stage", AUGMENTATIONS, ids=lambda stage: type(stage).__name__)
def test_an_augmentation_is_a_function_of_the_generators(stage):
    def seen(stage, key):
        with seeded_generators(key):
            return np.asarray(run_stages([stage], {**sample(), "image": photo(40, 30)})["image"])

    copied = pickle.loads(pickle.dumps(stage))  # as in a loader process
    found = [seen(stage, key) for key in range(8)]
    assert all(np.array_equal(one, seen(copied, key)) for key, one in enumerate(found))
    assert len({one.tobytes() for one in found}) > 1
    assert {one.shape for one in found} == {(30, 40, 3)}


def test_augmentations_are_those_of_torchvision_and_timm():
    image, fields = photo(40, 30), {**sample(), "image": photo(40, 30)}
    timm = rand_augment_transform(
        "rand-m9-n2-mstd0.5-inc1", {"translate_pct": 0.45, "img_mean": (128, 128, 128)}
    )
    affine = transforms.RandomAffine(
        9,
        (0.1, 0.1),
        (0.8, 1.2),
        interpolation=transforms.InterpolationMode.BILINEAR,
        fill=[9, 8, 7],
    )
    for stage, reference in (
        (RandAugment(), transforms.RandAugment(2, 9)),
        (RandomAffine(9, 0.1, (0.8, 1.2), (9, 8, 7)), affine),
        (TimmAugment(), timm),
    ):
        for key in range(5):
            with seeded_generators(key):
                found = run_stages([stage], fields)["image"]
            with seeded_generators(key):
                random.random()  # whether this sample is one of the share
                wanted = reference(image)
            assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_pictures_are_made_smaller_before_they_are_augmented():
    fields = {**sample(), "image": photo(80, 60)}
    assert run_stages([RandAugment(short_side=30)], fields)["image"].size == (40, 30)
    assert run_stages([ColorJitter(short_side=90)], fields)["image"].size == (80, 60)


def test_a_shift_lets_in_the_colour_that_was_asked_for():
    fields = {**sample(), "image": Image.new("RGB", (40, 40), (1, 2, 3))}
    small = RandomAffine(scale=(0.5, 0.5), fill=(255, 254, 253))
    pixels = np.asarray(run_stages([small], fields)["image"])
    assert pixels[0, 0].tolist() == [255, 254, 253]
    assert pixels[20, 20].tolist() == [1, 2, 3]
    assert (pixels == [1, 2, 3]).all(axis=2).sum() == 20 * 20


def test_stages_that_leave_texts_say_so_and_are_held_to_it():
    names = ["RandomFlip", "ColorJitter", "RandAugment", "RandomAffine"] + 3 * ["TimmAugment"]
    assert names_of_changing(AUGMENTATIONS, ["text"]) == []
    assert names_of_changing(AUGMENTATIONS, ["image"]) == names
    assert names_of_changing([upper, RandomFlip()], ["text"]) == ["upper"]

    def shout(samples):
        yield from map(upper, samples)

    shout.leaves_texts = True
    with pytest.raises(UserError, match="shout changes a text, and its leaves_texts says") as info:
        run_stages([shout], sample())
    assert "\n" not in str(info.value)


def test_a_flip_spares_the_texts_that_the_user_says():
    for flip, text, mirrors in (
        (RandomFlip(1.0), "a fox on the LEFT", False),
        (RandomFlip(1.0), "ein Fuchs links", True),
        (RandomFlip(1.0, spares=r"\b(links|rechts)"), "ein Fuchs links", False),
        (RandomFlip(1.0, spares=None), "a fox on the left", True),
    ):
        fields = sample(text)
        assert (run_stages([flip], fields)["image"] is not fields["image"]) == mirrors


def test_boxes_that_would_be_left_behind_are_refused_before_training():
    for stage in (RandAugment(), RandomAffine(), TimmAugment()):
        with pytest.raises(UserError, match="leaves the boxes of") as info:
            check_stages([stage], reads_regions=True)
        assert "\n" not in str(info.value)
        check_stages([stage])
    check_stages([RandomFlip(), ColorJitter()], reads_regions=True)
    with pytest.raises(UserError, match="leaves the boxes"):
        ImageTextDataModule(
            "a.tar", stages=[RandAugment()], regions=RegionRule(json_field="regions")
        )


def test_evaluations_leave_augmentations_out():
    assert outside_of_training([RandomFlip(), upper, *AUGMENTATIONS]) == (upper,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomFlip(spares="("), r"spares \('\('\) of RandomFlip is no regular expression"),
        (lambda: ColorJitter(hue=0.7), "ColorJitter: .*hue"),
        (lambda: ColorJitter(grey=2.0), r"grey \(2.0\) of ColorJitter must be in \[0, 1\]"),
        (lambda: RandAugment(magnitude=31), r"magnitude \(31\) in \[0, 30\]"),
        (lambda: RandAugment(short_side=0), r"short_side \(0\) of RandAugment must be at least 1"),
        (lambda: RandomAffine(translate=2.0), r"translate \(2.0\) of RandomAffine must be in"),
        (lambda: RandomAffine(scale=(1.2, 0.8)), r"scale \(\[1.2, 0.8\]\) of RandomAffine must be"),
        (
            lambda: RandomAffine(scale=(1.0, float("inf"))),
            r"scale \(\[1.0, inf\]\) of RandomAffine",
        ),
        (lambda: RandomAffine(scale=(1e-320, 1.0)), r"\[least, most\] in \[0.01, 100\]"),
        (lambda: RandomAffine(degrees=float("nan")), r"degrees \(nan\) in \[0, 180\]"),
        (lambda: RandomAffine(fill=(0, 0, 256)), r"fill \(\[0, 0, 256\]\) of RandomAffine must be"),
        (lambda: TimmAugment("rand-q7"), r"policy \('rand-q7'\) of TimmAugment is none"),
        (lambda: TimmAugment("best"), r"policy \('best'\) of TimmAugment is none"),
    ],
)
def test_settings_of_augmentations_are_checked(make, message):
    with pytest.raises(UserError, match=message):
        make()
