import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dist_siglip.data import picture as module
from dist_siglip.data.faults import BadSampleError
from dist_siglip.data.picture import EncodedPicture, sniff_media_type
from tests.support.shards import encode, jpeg, photo, picture


def decode_image(data, max_pixels, reduction=1):
    return EncodedPicture(data, max_pixels=max_pixels).decode(reduction)


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
        EncodedPicture(jpeg(Image.new("RGB", size)), max_pixels=10**6)
    EncodedPicture(jpeg(Image.new("RGB", (2000, 10))), max_pixels=10**6)


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
