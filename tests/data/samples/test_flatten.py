import io
import warnings

import numpy as np
import pytest
from PIL import Image

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture import EncodedPicture, flatten, to_rgba
from dist_siglip.data.samples.picture_policy import PicturePolicy
from tests.support.hostile import chunk
from tests.support.pngs import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    SIDE,
    halves,
    numbers,
    png_of,
)
from tests.support.shards import encode, picture


def shown(mode, values):
    return Image.fromarray(values.astype(np.uint8).squeeze(), mode)


TRANSPARENT, OPAQUE = (255, 0, 0), (0, 0, 255)  # the left half hides red
PLTE = chunk(b"PLTE", bytes([*TRANSPARENT, *OPAQUE]))
FULL = 65535
# Each hides red (or white, where there is only grey) on the left and shows blue (or black).
COLOURED = {
    "RGBA": png_of(RGBA, 8, halves((255, 0, 0, 0), (0, 0, 255, 255))),
    "RGBA of 16 bits": png_of(RGBA, 16, halves((FULL, 0, 0, 0), (0, 0, FULL, FULL))),
    "palette with alphas": png_of(PALETTE, 8, halves(0, 1), PLTE, chunk(b"tRNS", b"\0\xfe")),
    "palette with one hole": png_of(PALETTE, 1, halves(0, 1), PLTE, chunk(b"tRNS", b"\0")),
    "RGB with a key": png_of(
        RGB, 8, halves(TRANSPARENT, OPAQUE), chunk(b"tRNS", numbers(255, 0, 0))
    ),
    "RGB of 16 bits with a key": png_of(
        RGB, 16, halves((FULL, 0, 0), (0, 0, FULL)), chunk(b"tRNS", numbers(FULL, 0, 0))
    ),
}
GREYS = {
    "LA": png_of(GREY_ALPHA, 8, halves((255, 0), (0, 255))),
    "LA of 16 bits": png_of(GREY_ALPHA, 16, halves((FULL, 0), (0, FULL))),
    "grey with a key": png_of(GREY, 8, halves(255, 0), chunk(b"tRNS", numbers(255))),
    "grey of 4 bits with a key": png_of(GREY, 4, halves(15, 0), chunk(b"tRNS", numbers(15))),
    "grey of 2 bits with a key": png_of(GREY, 2, halves(3, 0), chunk(b"tRNS", numbers(3))),
    "grey of 1 bit with a key": png_of(GREY, 1, halves(1, 0), chunk(b"tRNS", numbers(1))),
    "grey of 16 bits with a key": png_of(GREY, 16, halves(FULL, 0), chunk(b"tRNS", numbers(FULL))),
}


def decoded(data, **policy):
    return EncodedPicture(data, PicturePolicy(**policy)).decode()


def corners(image):
    return image.getpixel((0, 0)), image.getpixel((SIDE - 1, 0))


@pytest.mark.parametrize("name", [*COLOURED, *GREYS])
def test_what_is_transparent_shows_the_colour_below_it(name):
    is_grey = name in GREYS
    data = (COLOURED | GREYS)[name]
    hidden, opaque = ((255,) * 3, (0,) * 3) if is_grey else (TRANSPARENT, OPAQUE)
    assert EncodedPicture(data, PicturePolicy()).has_transparency
    left, right = corners(decoded(data, transparency="#00ff00"))
    assert left == (0, 255, 0)
    assert np.abs(np.subtract(right, opaque)).max() <= 1  # an alpha of 254 of the palette
    assert corners(decoded(data))[0] == (255, 255, 255)
    assert corners(decoded(data, transparency="drop")) == (hidden, opaque)


@pytest.mark.parametrize("mode", ["RGBA", "RGB"])
def test_webp_with_alpha_is_laid_on_a_ground_and_without_is_not(mode):
    transparent = shown("RGBA", halves((255, 0, 0, 0), (0, 0, 255, 255)))
    data = encode(transparent.convert(mode), "WEBP")
    assert EncodedPicture(data, PicturePolicy()).has_transparency == (mode == "RGBA")
    left, _ = corners(decoded(data))
    assert np.abs(np.subtract(left, (255, 255, 255) if mode == "RGBA" else TRANSPARENT)).max() < 9


def test_pixels_near_a_key_of_16_bits_are_not_transparent():
    values = halves(30_000, 30_001)
    data = png_of(GREY, 16, values, chunk(b"tRNS", numbers(30_000)))
    left, right = corners(decoded(data, transparency="#102030"))
    assert left == (16, 32, 48)
    assert right == ((30_001 + 128) // 257,) * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("colour", ["#ffffff", "#000000", "#336699"])
def test_every_alpha_is_a_weighted_mean(mode, colour):
    levels = np.arange(256, dtype=np.uint8)
    values, alphas = np.meshgrid(levels, levels)
    channels = [values] * (3 if mode == "RGBA" else 1)
    image = Image.fromarray(np.stack([*channels, alphas], axis=-1), mode)
    ground = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    found = np.asarray(flatten(image, colour)).astype(float)
    share = alphas[..., None] / 255
    exact = share * values[..., None] + (1 - share) * np.array(ground)
    assert np.abs(found - exact).max() <= 0.51


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa"])
def test_modes_that_no_file_has_are_laid_on_a_ground_too(mode):
    through = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}[mode]
    image = shown("RGBA", halves((255, 0, 0, 0), (0, 0, 255, 255))).convert(through).convert(mode)
    assert corners(flatten(image, "#00ff00"))[0] == (0, 255, 0)
    assert flatten(image, "drop").mode == "RGB"
    assert to_rgba(image).mode == "RGBA"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "F"])
def test_opaque_modes_are_converted_as_pillow_does(mode):
    image = picture(3).convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4), (50, 3, 9))
    for transparency in ("#00ff00", "drop"):
        found = flatten(image, transparency)
        assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_the_picture_that_was_given_stays_as_it_is():
    with Image.open(io.BytesIO(COLOURED["palette with alphas"])) as image:
        image.load()
        before, information = image.tobytes(), dict(image.info)
        for transparency in ("#ffffff", "drop"):
            flatten(image, transparency)
        assert (image.tobytes(), image.info) == (before, information)


@pytest.mark.parametrize("transparency", ["#ffffff", "drop"])
@pytest.mark.parametrize("name", [*COLOURED, *GREYS])
def test_no_warning_of_pillow_and_no_word_of_alpha_is_left(name, transparency):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decoded((COLOURED | GREYS)[name], transparency=transparency)
    assert image.mode == "RGB"
    assert not image.has_transparency_data


def test_a_picture_without_its_palette_is_not_shown_in_black():
    with pytest.raises(BadSampleError, match="lost its palette"):
        EncodedPicture(png_of(PALETTE, 8, halves(0, 9)), PicturePolicy())
