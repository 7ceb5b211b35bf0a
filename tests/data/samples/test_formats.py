"""Formats that are read on request, and grey of more than 8 bits."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, features

from dist_siglip.data.samples import picture_policy
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture import EncodedPicture, flatten, sniff_media_type
from dist_siglip.data.samples.picture_policy import (
    EXTENSIONS_OF,
    FORMATS,
    PICTURE_EXTENSIONS,
    PicturePolicy,
    with_formats,
)
from dist_siglip.data.samples.stages import run_stages
from dist_siglip.errors import UserError
from tests.support.hostile import gif, run_length_bmp, saved, tiff
from tests.support.shards import photo, picture

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
REQUESTED = [
    ("gif", {}),
    ("tiff", {}),
    ("tiff", {"compression": "tiff_lzw"}),
    ("bmp", {}),
    pytest.param("avif", {"quality": 100, "subsampling": "4:4:4"}, marks=needs_avif),
]


def policy(*formats, **settings):
    return PicturePolicy(formats=formats, **settings)


def decoded(data, *formats, **settings):
    return np.asarray(EncodedPicture(data, policy(*formats, **settings)).decode())


@pytest.mark.parametrize(("name", "options"), REQUESTED)
def test_a_format_is_decoded_if_it_is_named_and_no_other_is(name, options):
    data = saved(picture(1), name, **options)
    assert sniff_media_type(data) == f"image/{name}"
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(decoded(data, name), np.asarray(opened.convert("RGB")))
    encoded = EncodedPicture(data, policy(name))
    assert (encoded.size, encoded.looks_as_stored) == ((20, 20), False)
    for others in (FORMATS, ("jpeg",), tuple(set(EXTENSIONS_OF) - {name, "heic", "avif"})):
        with pytest.raises(BadSampleError, match=f"but {name}, which data.formats does not name"):
            decoded(data, *others)
    with pytest.raises(BadSampleError, match="20 x 20 pixels, at most 399"):
        decoded(data, name, max_image_pixels=399)
    for part in range(10):
        with pytest.raises(BadSampleError):
            decoded(data[: len(data) * part // 20], name)


def test_jpegs_can_be_left_out():
    with pytest.raises(BadSampleError, match="no PNG file but jpeg"):
        decoded(saved(picture(1), "JPEG"), "png")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", pytest.param("AVIF", marks=needs_avif)])
def test_the_first_of_several_pictures_is_taken(kind):
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue", "lime")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decoded(data, kind.lower()).astype(int) - [255, 0, 0]).max() < 4


def test_what_a_gif_hides_is_laid_on_the_colour():
    hidden = Image.new("P", (4, 4), 1)
    hidden.putpalette([0, 255, 0, 255, 0, 0])
    data = saved(hidden, "GIF", transparency=1)
    assert EncodedPicture(data, policy("gif")).has_transparency
    assert decoded(data, "gif", transparency="#0000ff")[0, 0].tolist() == [0, 0, 255]
    assert decoded(data, "gif", transparency="drop")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("apply", ["ignore", "apply"])
def test_a_tiff_is_turned_as_its_tag_says_whatever_the_policy(apply):
    image = photo(40, 20)
    data = saved(image, "TIFF", tiffinfo={0x0112: 6})
    encoded = EncodedPicture(data, policy("tiff", exif_orientation=apply))
    assert encoded.size == (20, 40)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(encoded.decode()), np.asarray(turned))


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (gif((40_000, 40_000), (1, 1)), "gif", "40000 x 40000 pixels, at most"),
        (gif((1, 1), (40_000, 40_000)), "gif", "40000 x 40000 pixels, at most"),
        (b"GIF89a" + bytes(1 << 20), "gif", "GIF without a picture in its first 16384 blocks"),
        (b"GIF89a" + bytes(7) + b"!\xfe" + b"\1c" * 70_000, "gif", "GIF without a picture"),
        (tiff(40_000, 40_000), "tiff", "40000 x 40000 pixels, at most"),
        (tiff(16, 16, tile=(60_000, 60_000)), "tiff", "tiles of 60000 x 60000 pixels"),
        (saved(Image.new("L", (5000, 10)), "TIFF"), "tiff", "at most 200 : 1"),
        (
            tiff(16, 16, more=[(each, 7, 300, 0) for each in range(400, 420)]),
            "tiff",
            "tags of 6000 ",
        ),
        (
            tiff(16, 16, more=[(330, 4, 1 << 20, 8)]),
            "tiff",
            "tag of 1048576 values, at most 262144",
        ),
    ],
)
def test_claims_are_refused_from_the_header(data, name, message):
    with pytest.raises(BadSampleError, match=message):
        EncodedPicture(data, policy(name))


def test_runs_that_pillow_unpacks_in_python_are_bounded():
    assert decoded(run_length_bmp(30, 20), "bmp").shape == (20, 30, 3)
    with pytest.raises(BadSampleError, match="3000 x 3000 pixels, at most 4000000"):
        EncodedPicture(run_length_bmp(3000, 3000), policy("bmp"))


def test_the_limit_of_pillow_is_none_of_ours(monkeypatch):
    for kind in ("GIF", "TIFF", "BMP"):
        data = saved(picture(1), kind)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decoded(data, kind.lower(), max_image_pixels=400).shape == (20, 20, 3)
        assert Image.MAX_IMAGE_PIXELS == 10
        monkeypatch.undo()


VALUES = np.array([[0, 99, 100, 150, 200, 201, 65535]], dtype=np.uint16)


def in_window(value, low, high):
    """The reference: what a value looks like in 8 bits."""
    return round(255 * min(1.0, max(0.0, (float(value) - low) / (high - low))))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("window", [(100, 200), (0, 65535), (-50.5, 250.25)])
def test_a_window_spreads_its_values(kind, window):
    data = saved(Image.fromarray(VALUES), kind)
    pixels = decoded(data, "png", "tiff", intensity_window=window)
    assert pixels[0, :, 0].tolist() == [in_window(value, *window) for value in VALUES[0].tolist()]
    assert (pixels == pixels[:, :, :1]).all()
    if window == (0, 65535):
        assert np.array_equal(pixels, decoded(data, "png", "tiff"))


def test_fractions_need_a_window_and_what_is_no_number_is_black():
    values = np.array([[0.0, 0.25, 1.0, np.nan, np.inf, -np.inf]], dtype=np.float32)
    data = saved(Image.fromarray(values), "TIFF")
    with pytest.raises(BadSampleError, match="fractions needs data"):
        decoded(data, "tiff")
    found = decoded(data, "tiff", intensity_window=(0, 1))[0, :, 0].tolist()
    assert found == [0, 64, 255, 0, 255, 0]


@pytest.mark.filterwarnings("error")
def test_windows_and_values_at_the_ends_of_their_types():
    top = np.iinfo(np.int32).max
    whole = Image.fromarray(np.array([[-top - 1, 0, top - 10, top - 5, top]], dtype=np.int32))
    found = decoded(saved(whole, "TIFF"), "tiff", intensity_window=(top - 10, top))
    assert found[0, :, 0].tolist() == [0, 0, 0, 128, 255]
    assert decoded(saved(whole, "TIFF"), "tiff")[0, :, 0].tolist() == [0, 0, 255, 255, 255]
    largest = np.finfo(np.float32).max
    fractions = Image.fromarray(np.array([[-largest, 0, largest]], dtype=np.float32))
    for window, expected in (((0, 1e-40), [0, 0, 255]), ((-1e300, 1e300), [128, 128, 128])):
        data = saved(fractions, "TIFF")
        assert decoded(data, "tiff", intensity_window=window)[0, :, 0].tolist() == expected


def test_a_window_changes_no_picture_of_8_bits():
    for image in (picture(1), picture(1).convert("L"), picture(1).convert("P")):
        data = saved(image, "PNG")
        assert np.array_equal(decoded(data, "png", intensity_window=(10, 20)), decoded(data, "png"))


def test_a_stage_gets_the_values_and_what_it_leaves_is_seen_through_the_window():
    class Minus100:
        picture_mode = "stored"

        def __call__(self, samples):
            for sample in samples:
                values = np.asarray(sample["image"]).astype(np.int32) - 100
                yield {**sample, "image": Image.fromarray(values)}

    sample = {"__key__": "k", "__url__": "s", "text": "a hen", "image": Image.fromarray(VALUES)}
    found = np.asarray(run_stages([Minus100()], sample, window=(0, 100))["image"])
    assert found[0, :, 0].tolist() == [in_window(int(v) - 100, 0, 100) for v in VALUES[0]]
    assert flatten(Image.fromarray(VALUES), "drop", (100, 200)).mode == "RGB"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ()}, r"formats \(\) must be some of jpeg"),
        ({"formats": ("png", "psd")}, r"formats \(png, psd\) must be some of .*heic"),
        ({"intensity_window": (2, 2)}, r"intensity_window \(\[2, 2\]\) must be \[low, high\]"),
        ({"intensity_window": (0, float("nan"))}, r"intensity_window"),
        ({"intensity_window": (0, float("inf"))}, r"intensity_window"),
    ],
)
def test_what_is_no_policy_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        PicturePolicy(**settings)


def test_a_format_without_its_package_names_the_package(monkeypatch):
    monkeypatch.setattr(picture_policy, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "dist-siglip\[heic\]"'):
        policy("heic")
    monkeypatch.setattr(picture_policy.features, "check", lambda name: None)
    with pytest.raises(UserError, match=r"formats \(avif\) needs a Pillow"):
        policy("avif")


def test_formats_bring_their_extensions_unless_others_are_named():
    assert with_formats(PICTURE_EXTENSIONS, ["png", "tiff"]) == (*PICTURE_EXTENSIONS, "tif", "tiff")
    assert with_formats(["scan"], ["tiff"]) == ("scan",)
    assert policy("tiff", "png", "png").formats == ("png", "tiff")


def test_heic_is_read_with_its_package():
    heif = pytest.importorskip("pillow_heif", reason="the extra heic is not installed")
    buffer = io.BytesIO()
    heif.from_pillow(photo(64, 48)).save(buffer, quality=100, chroma=444)
    data = buffer.getvalue()
    assert sniff_media_type(data) == "image/heic"
    found = decoded(data, "heic")
    assert found.shape == (48, 64, 3)
    assert np.array_equal(found, np.asarray(heif.read_heif(data).to_pillow().convert("RGB")))
    assert np.abs(found.astype(int) - np.asarray(photo(64, 48))).mean() < 4
    with pytest.raises(BadSampleError, match="64 x 48 pixels, at most 99"):
        decoded(data, "heic", max_image_pixels=99)
    for part in range(10):
        with pytest.raises(BadSampleError):
            decoded(data[: len(data) * part // 20], "heic")
