from dataclasses import replace

import pytest
import torch
from open_clip.transform import image_transform

from dist_siglip.data.samples.batch import ImageNormalizer
from dist_siglip.data.samples.dataset import seeded_generators
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import evaluation_transform, training_transform
from tests.support.shards import jpeg, photo, picture, tiny_inputs


def normalized(pixels, inputs):
    return ImageNormalizer(inputs.mean, inputs.std).pixels(pixels[None])[0]


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
    assert ours.dtype == torch.uint8
    assert torch.equal(normalized(ours, inputs), theirs(image))


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
        assert torch.equal(normalized(first, inputs), second)


def test_no_crop_scale_is_the_evaluation_transform():
    image = picture(3, side=33)
    unaugmented = training_transform(tiny_inputs(), None)(image)
    assert torch.equal(unaugmented, evaluation_transform(tiny_inputs())(image))
    cropped = training_transform(tiny_inputs(), (0.2, 0.3))(image)
    assert not torch.equal(cropped, unaugmented)


def crops(data, scaled_decode, inputs, keys=range(8)):
    transform = training_transform(inputs, (0.5, 1.0), scaled_decode=scaled_decode)
    found = []
    for key in keys:
        with seeded_generators(key):
            found.append(transform(EncodedPicture(data, PicturePolicy(max_image_pixels=10**7))))
    return torch.stack(found)


def test_crops_of_encoded_pictures_are_those_of_open_clip():
    inputs = replace(tiny_inputs(), image_size=(24, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    data = jpeg(photo(300, 200))
    theirs = image_transform(
        (24, 32), is_train=True, mean=inputs.mean, std=inputs.std, aug_cfg={"scale": (0.5, 1.0)}
    )
    ours = crops(data, False, inputs)
    for key, pixels in enumerate(ours):
        with seeded_generators(key):
            expected = theirs(EncodedPicture(data, PicturePolicy(max_image_pixels=10**7)).decode())
        assert torch.equal(normalized(pixels, inputs), expected)


def test_scaled_decoding_shows_the_same_crop_nearly_to_the_pixel(monkeypatch):
    asked = []
    decode = EncodedPicture.decode
    monkeypatch.setattr(
        EncodedPicture,
        "decode",
        lambda self, reduction=1: asked.append(reduction) or decode(self, reduction),
    )
    inputs = replace(tiny_inputs(), image_size=64)
    data = jpeg(photo(600, 400))
    exact, scaled = (crops(data, choice, inputs).double() for choice in (False, True))
    assert set(asked) == {1, 4}
    error = (exact - scaled).abs()
    assert error.mean() < 1.5  # of 255
    psnr_db = 10 * torch.log10(255**2 / (exact - scaled).square().mean())
    assert psnr_db > 38
    assert not torch.equal(exact, scaled)


def test_small_pictures_are_decoded_in_full():
    inputs = replace(tiny_inputs(), image_size=64)
    data = jpeg(photo(100, 90))
    assert torch.equal(crops(data, True, inputs), crops(data, False, inputs))
