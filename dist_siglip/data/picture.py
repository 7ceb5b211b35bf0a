"""How do the bytes of a member become a picture, without trusting them?

Only JPEG, PNG and WebP decoders are offered the bytes, whatever the member is called; size and
shape are read from the header and capped before any pixel is decoded. Nothing here unpickles,
unpacks or executes. Every way the bytes can be wrong ends in ``BadSampleError``.

A JPEG can be decoded at a half, a quarter or an eighth of its size for a fraction of the time: its
coefficients are frequencies. Where ``simplejpeg`` is installed it decodes plain JPEGs, to the same
pixels as Pillow.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from dist_siglip.data.faults import BadSampleError

try:
    import simplejpeg
except ImportError:  # the extra "fast" is not installed
    simplejpeg = None

_FORMATS = ("JPEG", "PNG", "WEBP")
_MAX_ASPECT_RATIO = 200  # resizing the short side of anything longer would fill the memory
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
REDUCTIONS = (8, 4, 2, 1)


class EncodedPicture:
    """A picture whose size is known and whose pixels are not decoded yet.

    Args:
        data: a JPEG, PNG or WebP file.
        max_pixels: largest width times height.

    Attributes:
        size: (width, height) in pixels, of the full picture; the EXIF orientation is ignored, as
            in open_clip.

    Raises:
        BadSampleError: if the bytes are another format, their header is damaged, or they claim
            too many pixels or a side 200 times as long as the other.
    """

    def __init__(self, data: bytes, *, max_pixels: int) -> None:
        with _bad_if_it_fails():
            self._image = Image.open(io.BytesIO(data), formats=_FORMATS)
        self._data = data
        self.size: tuple[int, int] = self._image.size
        width, height = self.size
        if width * height > max_pixels:
            raise BadSampleError(f"picture of {width} x {height} pixels, at most {max_pixels}")
        if max(self.size) > _MAX_ASPECT_RATIO * min(self.size):
            raise BadSampleError(
                f"picture of {width} x {height} pixels, at most {_MAX_ASPECT_RATIO} : 1"
            )

    def decode(self, reduction: int = 1) -> Image.Image:
        """Decode to RGB, once.

        Transparency is dropped, the first frame of an animation is taken, 16 bits are rounded to 8.

        Args:
            reduction: 1, 2, 4 or 8: decode a JPEG at this fraction of its width and height,
                rounded up. Other formats come in full.

        Raises:
            BadSampleError: if the bytes are damaged.
        """
        with _bad_if_it_fails(), self._image as image:
            is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            if is_plain and simplejpeg is not None:
                try:
                    return Image.fromarray(_decode_fast(self._data, self.size, reduction))
                except ValueError:
                    pass  # stricter than Pillow, which has the last word
            if is_plain and reduction > 1:
                image.draft("RGB", tuple(max(1, side // reduction) for side in self.size))
            if image.mode.startswith("I"):
                return _from_16_bits(image)
            return image.convert("RGB")


def sniff_media_type(data: bytes) -> str:
    """Tell the media type of a picture from its bytes, such as ``"image/png"``.

    Raises:
        BadSampleError: if it is neither JPEG, PNG nor WebP.
    """
    with _bad_if_it_fails(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return Image.MIME[str(image.format)]


def _decode_fast(data: bytes, size: tuple[int, int], reduction: int) -> np.ndarray:
    width, height = (-(-side // reduction) if reduction > 1 else 0 for side in size)
    pixels: np.ndarray = simplejpeg.decode_jpeg(
        data, colorspace="RGB", min_width=width, min_height=height, min_factor=reduction
    )
    return pixels


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Round grey values of 16 bits to 8; Pillow would cut them off at 255."""
    grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
    grey += 128
    grey //= 257
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


@contextmanager
def _bad_if_it_fails() -> Iterator[None]:
    """Decoding errors inside the block are bad samples."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise BadSampleError("picture cannot be decoded: no JPEG, PNG or WebP file") from error
    except _DECODER_ERRORS as error:
        raise BadSampleError(f"picture cannot be decoded: {error!r}") from error
