import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dist_siglip.data.decode import (
    decode_image,
    sniff_media_type,
)
from dist_siglip.data.faults import BadSampleError
from tests.support.shards import encode, picture


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
