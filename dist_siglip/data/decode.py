"""How do the bytes of a member become a picture, without trusting them?

Only JPEG, PNG and WebP decoders are offered the bytes, whatever the member is called; the size in
pixels is read from the header and capped before any pixel is decoded. Nothing here unpickles,
unpacks or executes. Every way the bytes can be wrong ends in ``BadSampleError``.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from dist_siglip.data.faults import BadSampleError

_FORMATS = ("JPEG", "PNG", "WEBP")
# What Pillow's decoders raise on damaged files; anything else is a defect and keeps its traceback.
_DECODER_ERRORS = (
    OSError,  # truncated data, unknown format
    SyntaxError,  # broken PNG chunks
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode a picture to RGB.

    Transparency is dropped, the first frame of an animation is taken and the EXIF orientation is
    ignored, as in open_clip.

    Args:
        data: a JPEG, PNG or WebP file.
        max_pixels: largest width times height.

    Raises:
        BadSampleError: if the bytes are another format, damaged, or claim too many pixels.
    """
    with _open_image(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise BadSampleError(f"picture of {width} x {height} pixels, at most {max_pixels}")
        return image.convert("RGB")


def sniff_media_type(data: bytes) -> str:
    """Tell the media type of a picture from its bytes, such as ``"image/png"``.

    Raises:
        BadSampleError: if it is neither JPEG, PNG nor WebP.
    """
    with _open_image(data) as image:
        return Image.MIME[str(image.format)]


@contextmanager
def _open_image(data: bytes) -> Iterator[Image.Image]:
    """Read the header of a picture; decoding errors inside the block are bad samples."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            yield image
    except _DECODER_ERRORS as error:
        raise BadSampleError(f"picture cannot be decoded: {error!r}") from error
