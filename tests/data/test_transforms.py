from dataclasses import replace

import pytest
import torch
from open_clip.transform import image_transform

from dist_siglip.data.randomness import seeded_generators
from dist_siglip.data.transforms import evaluation_transform, training_transform
from tests.support.shards import picture, tiny_inputs


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("image_size", [16, (12, 16)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_pixels_are_those_of_open_clip(resize_mode, image_size, interpolation):
    inputs = replace(
        tiny_inputs(), resize_mode=resize_mode, image_size=image_size, interpolation=interpolation
    )
    theirs = image_transform(
        image_size,
        is_train=False,
        mean=inputs.mean,
        std=inputs.std,
        resize_mode=resize_mode,
        interpolation=interpolation,
    )
    image = picture(3, side=33).crop((0, 0, 33, 25))
    ours = evaluation_transform(inputs)(image)
    assert ours.shape == (3, 16, 16) if image_size == 16 else (3, 12, 16)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs(image))


def test_training_crops_are_those_of_open_clip():
    inputs = tiny_inputs()
    theirs = image_transform(
        16, is_train=True, mean=inputs.mean, std=inputs.std, aug_cfg={"scale": (0.4, 1.0)}
    )
    ours = training_transform(inputs, (0.4, 1.0))
    for key in range(5):
        with seeded_generators(key):
            first = ours(picture(3))
        with seeded_generators(key):
            second = theirs(picture(3))
        assert torch.equal(first, second)


def test_no_crop_scale_is_the_evaluation_transform():
    image = picture(3, side=33)
    unaugmented = training_transform(tiny_inputs(), None)(image)
    assert torch.equal(unaugmented, evaluation_transform(tiny_inputs())(image))
    cropped = training_transform(tiny_inputs(), (0.2, 0.3))(image)
    assert not torch.equal(cropped, unaugmented)
