import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import dist_siglip
from dist_siglip.data.samples import picture as module
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.dataset import seeded_generators
from dist_siglip.data.samples.picture import EncodedPicture, sniff_media_type
from dist_siglip.data.samples.picture.headers import webp_size
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import training_transform
from tests.support.shards import encode, jpeg, photo, picture, tiny_inputs


def decode_image(data, max_pixels, reduction=1):
    return EncodedPicture(data, PicturePolicy(max_image_pixels=max_pixels)).decode(reduction)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_three_formats_decode_to_rgb(kind):
    data = encode(picture(1), kind)
    image = decode_image(data, max_pixels=400)
    assert (image.mode, image.size) == ("RGB", (20, 20))
    assert sniff_media_type(data) == f"image/{kind.lower()}"
    if kind == "PNG":
        assert np.array_equal(np.asarray(image), np.asarray(picture(1)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "I;16"])
def test_other_modes_become_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = Image.new("I;16", (5, 4)) if mode == "I;16" else picture(2).convert(mode)
    assert decode_image(encode(image, kind), max_pixels=400).mode == "RGB"


def test_pixel_cap_is_width_times_height():
    data = encode(picture(1))
    decode_image(data, max_pixels=400)
    with pytest.raises(BadSampleError, match="20 x 20 pixels, at most 399"):
        decode_image(data, max_pixels=399)


def test_bomb_is_refused_from_its_header_alone():
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(BadSampleError, match="9000 x 9000 pixels"):
        decode_image(data, max_pixels=64_000_000)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "EPS"])
def test_other_formats_are_never_parsed(kind):
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        decode_image(encode(picture(1), kind), max_pixels=400)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_are_bad_samples(kind):
    data = encode(picture(1, side=64), kind)
    cases = [data[: len(data) * part // 10] for part in range(9)]
    cases += [b"", b"\0" * 100, b"not a picture"]
    for case in cases:
        with pytest.raises(BadSampleError):
            decode_image(case, max_pixels=10_000)


def test_only_the_first_frame_is_taken():
    buffer = io.BytesIO()
    frames = [picture(1), picture(2)]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    image = decode_image(buffer.getvalue(), max_pixels=400)
    assert np.array_equal(np.asarray(image), np.asarray(frames[0]))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"quality": 30}, {"keep_rgb": True, "subsampling": 0}]
)
def test_the_fast_decoder_gives_the_pixels_of_pillow(monkeypatch, reduction, subsampling, options):
    pytest.importorskip("simplejpeg")
    for image in (photo(203, 97), photo(64, 64, 1).convert("L")):
        data = jpeg(image, **{"subsampling": subsampling, **options})
        fast = decode_image(data, 10**6, reduction)
        with monkeypatch.context() as patch:
            patch.setattr(module, "simplejpeg", None)
            slow = decode_image(data, 10**6, reduction)
        assert fast.size == slow.size == tuple(-(-side // reduction) for side in image.size)
        assert np.array_equal(np.asarray(fast), np.asarray(slow))


def test_a_reduced_jpeg_looks_like_the_full_one_resized():
    image = photo(400, 300)
    data = jpeg(image)
    full = decode_image(data, 10**6)
    for reduction in (2, 4):
        reduced = decode_image(data, 10**6, reduction)
        expected = full.resize(reduced.size, Image.Resampling.BOX)
        difference = np.abs(np.asarray(reduced, dtype=float) - np.asarray(expected, dtype=float))
        assert difference.mean() < 1.5


def test_only_jpegs_are_reduced():
    data = encode(picture(1), "PNG")
    assert decode_image(data, 400, 4).size == (20, 20)


def test_grey_of_16_bits_is_rounded_to_8_not_cut_off():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    pixels = np.asarray(decode_image(buffer.getvalue(), 100))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert (pixels == pixels[:, :, :1]).all()


def test_the_orientation_of_a_camera_is_ignored_as_in_open_clip():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode_image(jpeg(photo(40, 20), exif=exif), 10**6).size == (40, 20)


@pytest.mark.parametrize("size", [(2010, 10), (10, 2010)])
def test_a_picture_like_a_thread_is_refused(size):
    with pytest.raises(BadSampleError, match="at most 200 : 1"):
        EncodedPicture(jpeg(Image.new("RGB", size)), PicturePolicy(max_image_pixels=10**6))
    EncodedPicture(jpeg(Image.new("RGB", (2000, 10))), PicturePolicy(max_image_pixels=10**6))


def test_a_truncated_jpeg_is_bad_with_either_decoder(monkeypatch):
    data = jpeg(photo(200, 100))
    for decoder in (module.simplejpeg, None):
        monkeypatch.setattr(module, "simplejpeg", decoder)
        with pytest.raises(BadSampleError, match="cannot be decoded"):
            decode_image(data[: len(data) // 2], 10**6)


def test_what_pillow_forgives_is_forgiven_by_the_fast_decoder():
    data = jpeg(photo(64, 48))
    assert np.array_equal(
        np.asarray(decode_image(data + b"trailing bytes", 10**6)),
        np.asarray(decode_image(data, 10**6)),
    )


def test_a_cmyk_jpeg_is_decoded_by_pillow_and_never_reduced():
    data = jpeg(photo(64, 48).convert("CMYK"))
    assert decode_image(data, 10**6, 4).size == (64, 48)


def turned(kind="JPEG", orientation=6, size=(40, 20)):
    """A picture that a camera says is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    buffer = io.BytesIO()
    photo(*size).save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    """Decode with and without the extra "fast"."""
    if request.param == "Pillow":
        monkeypatch.setattr(module, "simplejpeg", None)
    elif module.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_of_a_camera_is_applied_on_request(decoder, kind, orientation):
    data = turned(kind, orientation)
    apply = PicturePolicy(exif_orientation="apply")
    found = EncodedPicture(data, apply)
    plain = EncodedPicture(data, PicturePolicy()).decode()
    expected = ImageOps.exif_transpose(plain)
    assert found.size == expected.size == ((20, 40) if orientation > 4 else (40, 20))
    image = found.decode()
    assert image.size == expected.size
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    # A stage that looks at the metadata does not turn it once more.
    again = ImageOps.exif_transpose(image)
    assert np.array_equal(np.asarray(again), np.asarray(image))
    assert image.getexif()[0x010F] == "maker"


@pytest.mark.parametrize("orientation", [0, 9, 200])
def test_an_orientation_that_there_is_not_turns_nothing(orientation):
    found = EncodedPicture(turned("JPEG", orientation), PicturePolicy(exif_orientation="apply"))
    assert found.decode().size == (40, 20)


def test_damaged_metadata_turn_nothing_and_cost_no_picture():
    data = turned()
    place = data.index(b"Exif\0\0") + 6
    broken = data[:place] + b"\xff" * 12 + data[place + 12 :]
    found = EncodedPicture(broken, PicturePolicy(exif_orientation="apply"))
    assert found.decode().size == (40, 20)


def test_a_stage_sees_the_same_metadata_with_either_decoder(monkeypatch):
    pytest.importorskip("simplejpeg")
    photograph = turned()
    fast = EncodedPicture(photograph, PicturePolicy()).decode()
    monkeypatch.setattr(module, "simplejpeg", None)
    slow = EncodedPicture(photograph, PicturePolicy()).decode()
    assert fast.info == slow.info
    assert "exif" in fast.info
    assert ImageOps.exif_transpose(fast).size == ImageOps.exif_transpose(slow).size == (20, 40)
    assert type(fast) is type(slow)


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_a_turned_jpeg_is_reduced_as_any(decoder, reduction):
    found = EncodedPicture(turned(size=(64, 32)), PicturePolicy(exif_orientation="apply"))
    assert found.decode(reduction).size == (32 // reduction, 64 // reduction)


# What is missing of a JPEG.
CUTS = {"two bytes": slice(-2), "one byte": slice(-1), "a tenth": slice(-600), "half": slice(-3000)}


def long_jpeg(**options):
    return jpeg(photo(160, 120), **options)


@pytest.mark.parametrize("cut", CUTS)
def test_a_truncated_jpeg_is_used_as_far_as_it_goes_on_request(decoder, cut):
    data = long_jpeg()
    whole = np.asarray(decode_image(data, 10**6)).astype(int)
    assert len(data) > 4000
    found = EncodedPicture(data[CUTS[cut]], PicturePolicy(truncated_pictures="use"))
    pixels = np.asarray(found.decode()).astype(int)
    assert found.is_truncated
    assert np.array_equal(pixels[:16], whole[:16])
    assert np.array_equal(pixels, whole) == (cut in ("two bytes", "one byte"))
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        decode_image(data[CUTS[cut]], 10**6)


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_pixels_do_not_depend_on_the_decoder(monkeypatch, reduction, progressive):
    pytest.importorskip("simplejpeg")
    data = long_jpeg(progressive=progressive)
    policy = PicturePolicy(truncated_pictures="use")
    for cut in (1, 3, 1000, 2000, 3000):
        fast = EncodedPicture(data[:-cut], policy).decode(reduction)
        with monkeypatch.context() as patch:
            patch.setattr(module, "simplejpeg", None)
            slow = EncodedPicture(data[:-cut], policy).decode(reduction)
        assert np.array_equal(np.asarray(fast), np.asarray(slow))


def test_a_progressive_jpeg_is_used_wherever_it_ends_behind_its_first_scan():
    data = long_jpeg(progressive=True)
    whole = np.asarray(decode_image(data, 10**6)).astype(float)
    policy = PicturePolicy(truncated_pictures="use")
    tables = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xc4"]
    assert len(tables) > 3
    between = [place + step for place in tables[2:] for step in range(0, 12, 3)]
    for end in between:
        pixels = np.asarray(EncodedPicture(data[:end], policy).decode()).astype(float)
        assert np.abs(pixels - whole).mean() < 40


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_a_truncated_png_is_used_as_far_as_it_goes_on_request(mode):
    image = picture(3, side=64).convert(mode)
    data = encode(image)
    found = EncodedPicture(data[: len(data) * 2 // 3], PicturePolicy(truncated_pictures="use"))
    pixels, whole = np.asarray(found.decode()), np.asarray(image.convert("RGB"))
    assert found.is_truncated
    assert np.array_equal(pixels[:16], whole[:16])
    nothing = image.getpalette()[:3] if mode == "P" else 255 if mode == "RGBA" else 0
    assert (pixels[-1] == nothing).all()
    assert not np.array_equal(pixels, whole)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_is_damaged_otherwise_is_bad_in_any_case(kind):
    data = encode(picture(1, side=64), kind)
    policy = PicturePolicy(truncated_pictures="use")
    for case in (data[:20], data[: len(data) // 2 if kind == "WEBP" else 40], b"", b"no picture"):
        with pytest.raises(BadSampleError):
            EncodedPicture(case, policy).decode()
    if kind == "PNG":
        middle = len(data) // 2
        with pytest.raises(BadSampleError):
            EncodedPicture(data[:middle] + bytes(200) + data[middle + 200 :], policy).decode()


def test_a_whole_picture_is_not_called_truncated(decoder):
    for kind in ("JPEG", "PNG", "WEBP"):
        found = EncodedPicture(encode(picture(1), kind), PicturePolicy(truncated_pictures="use"))
        found.decode()
        assert not found.is_truncated


def described(kind, body, *, last=False):
    """A PNG with one more chunk, before or after its pixels."""
    data = encode(picture(5))
    size = len(body).to_bytes(4, "big")
    extra = size + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    place = data.index(b"IEND") - 4 if last else data.index(b"IDAT") - 4
    return data[:place] + extra + data[place:]


MIB = 1 << 20


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(MIB + 10))),
        (b"zTXt", b"key\0\0" + zlib.compress(bytes(2 * MIB))),
        (b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(2 * MIB))),
        (b"tEXt", b"key\0" + b"a" * (65 * MIB)),
    ],
)
def test_descriptions_of_more_than_a_mebibyte_cost_no_picture(kind, body, last):
    image = decode_image(described(kind, body, last=last), 10**6)
    assert np.array_equal(np.asarray(image), np.asarray(picture(5)))


def test_descriptions_of_less_are_kept_for_stages():
    body = b"profile\0\0" + zlib.compress(bytes(1000))
    assert len(decode_image(described(b"iCCP", body), 10**6).info["icc_profile"]) == 1000


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("limit", [10, 300])
def test_the_limit_of_pillow_is_none_of_ours(monkeypatch, kind, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # 400 pixels are a bomb, or warned of
    data = encode(picture(1), kind)
    transform = training_transform(tiny_inputs(), (0.9, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data, 400).size == (20, 20)
        assert sniff_media_type(data) == f"image/{kind.lower()}"
        cropped = transform(EncodedPicture(data, PicturePolicy()))
        with pytest.raises(BadSampleError, match="20 x 20 pixels, at most 399"):
            decode_image(data, 399)
    assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert cropped.shape == transform(EncodedPicture(data, PicturePolicy())).shape


def test_a_crop_above_the_limit_of_pillow_has_the_same_pixels(monkeypatch):
    transform = training_transform(tiny_inputs(), (0.3, 1.0))
    found = []
    for limit in (None, 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with seeded_generators(3):
            found.append(transform(EncodedPicture(encode(picture(1)), PicturePolicy())))
    assert torch.equal(*found)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_size_of_a_webp_is_read_before_it_is_opened(lossless, mode):
    buffer = io.BytesIO()
    photo(301, 77).convert(mode).save(buffer, "WEBP", lossless=lossless)
    assert webp_size(buffer.getvalue()) == (301, 77)
    for short in range(40):
        webp_size(buffer.getvalue()[:short])


def test_a_jpeg_with_more_pictures_behind_it_is_a_jpeg():
    buffer = io.BytesIO()
    photo(40, 20).save(buffer, "MPO", save_all=True, append_images=[photo(40, 20, 1)])
    data = buffer.getvalue()
    assert sniff_media_type(data) == "image/jpeg"
    assert decode_image(data, 10**6).size == (40, 20)


def test_the_defaults_of_all_readers_stand_once():
    package = Path(dist_siglip.__file__).parent
    source = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    assert source.count("64_000_000") == 1
    assert source.count('"jpg", "jpeg", "png", "webp"') == 1
    assert set(re.findall(r"max_bad_fraction: float = ([\w.]+)", source)) == {"MAX_BAD_FRACTION"}
