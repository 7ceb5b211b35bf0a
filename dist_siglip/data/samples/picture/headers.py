"""What the first bytes of a picture say, checked before its reader may take memory for them.

Pillow's readers are asked by name, not through ``Image.open``, whose limit of pixels is a second
one and warns; it is lifted only while a picture above it is opened.
"""

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture_policy import FORMATS, PicturePolicy

_MAX_ASPECT_RATIO = 200  # resizing the short side of anything longer would fill the memory
_MOST_RUN_LENGTHS = 4_000_000  # pixels of a BMP that Pillow unpacks byte by byte, in Python
_MOST_BLOCKS_OF_GIF = 1 << 14
_MOST_VALUES_OF_TIFF = 1 << 18  # of one tag, such as the places of strips
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DESCRIPTIONS = frozenset({b"iCCP", b"tEXt", b"zTXt", b"iTXt"})  # chunks that no pixel depends on
_SEGMENTS_OF_JPEG = (b"\xff\xc4", b"\xff\xda", b"\xff\xdb", b"\xff\xdd")  # before and between scans
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
# Bytes of a value of each type of TIFF: characters, then numbers, which readers make objects of.
_BYTES_OF_TYPE = {1: 1, 2: 1, 6: 1, 7: 1}
_NUMBERS_OF_TIFF = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_BYTES_OF_TYPE |= _NUMBERS_OF_TIFF
# Bits of the values of a PNG by Pillow's raw mode, and what brings them to 8.
_SCALES = {"L;2": (2, 85), "L;4": (4, 17), "L": (8, 1)}
# What only readers of formats that are read on request raise.
_SELDOM_ERRORS = (
    AssertionError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    UnboundLocalError,
)
_LIMIT_OF_PILLOW = threading.Lock()


def webp_size(data: bytes) -> tuple[int, int]:
    """Read width and height of a WebP; (1, 1) if its first chunk is none that has them."""
    kind = data[12:16]
    if len(data) < 30:
        return 1, 1
    if kind == b"VP8X":
        return _number(data[24:27]) + 1, _number(data[27:30]) + 1
    if kind == b"VP8L":
        bits = _number(data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return max(1, _number(data[26:28]) & 0x3FFF), max(1, _number(data[28:30]) & 0x3FFF)
    return 1, 1


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def gif_size(data: bytes) -> tuple[int, int]:
    """Read width and height that a GIF gets by its screen and its first frame; (1, 1) if neither.

    Pillow makes a canvas of a frame while it opens the file.

    Raises:
        BadSampleError: if the frame begins behind 16,384 blocks, or bytes that are none.
    """
    if len(data) < 13:
        return 1, 1
    width, height = _number(data[6:8]), _number(data[8:10])
    place = 13 + _palette_bytes(data[10])
    is_extension = False
    for _ in range(_MOST_BLOCKS_OF_GIF):
        mark = data[place : place + 1]
        if is_extension:
            is_extension = mark not in (b"\0", b"")
            place += 1 + (mark[0] if mark else 0)
        elif mark in (b",", b";", b""):
            break
        else:
            is_extension = mark == b"!"
            place += 2 if is_extension else 1
    else:
        raise BadSampleError(f"GIF without a picture in its first {_MOST_BLOCKS_OF_GIF} blocks")
    left, top, columns, rows = (
        _number(data[place + start : place + start + 2]) for start in (1, 3, 5, 7)
    )
    return max(width, left + columns, 1), max(height, top + rows, 1)


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def check_tags(data: bytes) -> None:
    """Look at the first tags of a TIFF, or of EXIF, which is one without pixels.

    Each names a range of the file that holds its values, and ranges may be one and the same: of a
    small file readers could make tens of thousands of copies.

    Raises:
        BadSampleError: if together they are longer than the file, or one has more than 262,144
            values in an array of numbers.
    """
    order: Literal["little", "big"] = "big" if data[:1] == b"M" else "little"

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], order)

    is_big = data[2:3] == b"+"  # as Pillow reads it
    width, entry, counter = (8, 20, 8) if is_big else (4, 12, 2)
    start = number(width, width)  # of the directory
    first = start + counter
    total = 0
    for place in range(first, min(first + entry * number(start, counter), len(data)), entry):
        kind, count = number(place + 2, 2), number(place + 4, width)
        if kind in _NUMBERS_OF_TIFF and count > _MOST_VALUES_OF_TIFF:
            raise BadSampleError(f"tag of {count} values, at most {_MOST_VALUES_OF_TIFF}")
        size = count * _BYTES_OF_TYPE.get(kind, 0)
        total += size if size > width else 0
    if total > len(data):
        raise BadSampleError(f"tags of {total} bytes in {len(data)} bytes")


def end_of_segments(data: bytes) -> int:
    """Find where a JPEG that ends too early has whole segments: tables, and scans so far."""
    start = max(data.rfind(marker) for marker in _SEGMENTS_OF_JPEG)
    is_whole = start + 4 <= len(data) and start + 2 + _length(data, start) <= len(data)
    return len(data) if is_whole else start


def _length(data: bytes, start: int) -> int:
    return int.from_bytes(data[start + 2 : start + 4], "big")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Go through the chunks of a PNG: type, first byte, byte after the last."""
    start = len(PNG_SIGNATURE)
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield data[start + 4 : start + 8], start, end
        start = end


def has_end(data: bytes) -> bool:
    """Whether a PNG has the chunk that ends it."""
    return any(kind == b"IEND" for kind, _, _ in _chunks(data))


def without_descriptions(data: bytes) -> bytes:
    """Leave profiles and texts out of a PNG: Pillow refuses those that inflate to a MiB."""
    kept = [data[start:end] for kind, start, end in _chunks(data) if kind not in _DESCRIPTIONS]
    return data[: len(PNG_SIGNATURE)] + b"".join(kept)


def sniff_media_type(data: bytes) -> str:
    r"""Tell the media type of a picture from its first bytes, such as ``"image/png"``.

    Raises:
        BadSampleError: if it is of no format that can be read.

    Example:
        >>> sniff_media_type(b"\xff\xd8\xff\xe0")
        'image/jpeg'
    """
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(PNG_SIGNATURE):
        return "image/png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "image/tiff"
    if data.startswith(b"BM"):
        return "image/bmp"
    if data[4:8] == b"ftyp":
        size = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12], *(data[start : start + 4] for start in range(16, size, 4))}
        if brands & {b"avif", b"avis"}:
            return "image/avif"
        if brands & _HEIF_BRANDS:
            return "image/heic"
    raise BadSampleError(f"picture cannot be decoded: {_no_file_of(FORMATS)}")


def _no_file_of(formats: Sequence[str]) -> str:
    names = [{"webp": "WebP"}.get(name, name.upper()) for name in formats]
    return f"no {' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} file"


def open_picture(data: bytes, policy: PicturePolicy) -> ImageFile:
    """Read the header by the one reader that the first bytes call for."""
    media_type = sniff_media_type(data)
    name = media_type.removeprefix("image/")
    if name not in policy.formats:
        raise BadSampleError(
            f"picture cannot be decoded: {_no_file_of(policy.formats)} but {name}, which "
            "data.formats does not name"
        )
    if name not in FORMATS:
        with seldom_errors():
            return _open_seldom(name, data, policy.max_image_pixels)
    if media_type == "image/jpeg":
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    if media_type == "image/webp":
        return _open_webp(data, policy.max_image_pixels)
    try:
        image = PngImagePlugin.PngImageFile(io.BytesIO(data))
    except ValueError:
        bare = without_descriptions(data)
        if len(bare) == len(data):
            raise
        image = PngImagePlugin.PngImageFile(io.BytesIO(bare))
    _bring_key_to_8_bits(image)
    return image


def _open_webp(data: bytes, max_pixels: int) -> ImageFile:
    """Check the size before Pillow makes a canvas of it."""
    if not WebPImagePlugin.SUPPORTED:
        raise BadSampleError("picture is WebP, which this build of Pillow cannot decode")
    size = webp_size(data)
    check_size(size, max_pixels)
    with without_limit(size):
        return WebPImagePlugin.WebPImageFile(io.BytesIO(data))


def _open_seldom(name: str, data: bytes, max_pixels: int) -> ImageFile:
    """Read the header of a format that is read on request."""
    stream = io.BytesIO(data)
    if name == "gif":
        size = gif_size(data)
        check_size(size, max_pixels)
        with without_limit(size):
            return GifImagePlugin.GifImageFile(stream)
    if name == "bmp":
        image: ImageFile = BmpImagePlugin.BmpImageFile(stream)
        if image.tile[0][0] == "bmp_rle":
            check_size(image.size, min(max_pixels, _MOST_RUN_LENGTHS))
        return image
    if name == "tiff":
        check_tags(data)
        image = TiffImagePlugin.TiffImageFile(stream)
        tile = [image.tag_v2.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_LENGTH)]
        if not all(isinstance(side, int) and side > 0 for side in tile):
            raise BadSampleError("picture has tiles without a size")
        if tile[0] * tile[1] > max_pixels:  # memory that libtiff would take
            raise BadSampleError(f"tiles of {tile[0]} x {tile[1]} pixels, at most {max_pixels}")
        return image
    if name == "avif":
        from PIL import AvifImagePlugin  # Pillow has it from 11.3 on

        # Loader processes decode side by side, one thread each.
        with _LIMIT_OF_PILLOW:
            threads = AvifImagePlugin.DEFAULT_MAX_THREADS
            AvifImagePlugin.DEFAULT_MAX_THREADS = 1
            try:
                return AvifImagePlugin.AvifImageFile(stream)
            finally:
                AvifImagePlugin.DEFAULT_MAX_THREADS = threads
    from pillow_heif import HeifImageFile

    heif: ImageFile = HeifImageFile(stream)
    return heif


@contextmanager
def seldom_errors() -> Iterator[None]:
    """Turn what only readers of seldom formats raise into an error of values."""
    try:
        yield
    except _SELDOM_ERRORS as error:
        raise ValueError(repr(error)) from error


@contextmanager
def without_limit(size: tuple[int, int]) -> Iterator[None]:
    """Lift Pillow's own limit of pixels for a picture above it."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or size[0] * size[1] <= limit:
        yield
        return
    with _LIMIT_OF_PILLOW:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Refuse too many pixels, and a side 200 times as long as the other.

    Raises:
        BadSampleError: if the size is one of these.
    """
    width, height = size
    if width * height > max_pixels:
        raise BadSampleError(f"picture of {width} x {height} pixels, at most {max_pixels}")
    if max(size) > _MAX_ASPECT_RATIO * min(size):
        raise BadSampleError(
            f"picture of {width} x {height} pixels, at most {_MAX_ASPECT_RATIO} : 1"
        )


def _bring_key_to_8_bits(image: ImageFile) -> None:
    """Write the transparent colour of a PNG in the values its pixels will have.

    Pillow scales pixels of 2 and 4 bits and cuts colours of 16, but leaves the colour as it is in
    the file.
    """
    key = image.info.get("transparency")
    raw_mode = str(image.tile[0][3]) if image.tile else ""
    if isinstance(key, tuple):
        image.info["transparency"] = tuple(
            each >> 8 if raw_mode == "RGB;16B" else each & 255 for each in key
        )
    elif isinstance(key, int) and raw_mode in _SCALES:
        bits, factor = _SCALES[raw_mode]
        image.info["transparency"] = (key & ((1 << bits) - 1)) * factor
