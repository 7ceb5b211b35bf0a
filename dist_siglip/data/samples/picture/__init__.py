"""Safe decoding of pictures.

Only the decoders of JPEG, PNG and WebP, and of other formats that a policy names, are offered the
bytes, whatever the member is called; size and shape are read from the header and capped before any
pixel is decoded. Nothing here unpickles, unpacks or executes. Every way the bytes can be wrong ends
in ``BadSampleError``.

A JPEG can be decoded at a half, a quarter or an eighth of its size for a fraction of the time.
Where ``simplejpeg`` is installed it decodes plain JPEGs, to the same pixels as Pillow and with the
same metadata.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture.headers import (
    check_size,
    check_tags,
    end_of_segments,
    has_end,
    open_picture,
    seldom_errors,
    sniff_media_type,
    without_descriptions,
    without_limit,
)
from dist_siglip.data.samples.picture.modes import IntensityWindow, flatten, is_deep, to_rgba
from dist_siglip.data.samples.picture_policy import FORMATS, PicturePolicy

__all__ = [
    "REDUCTIONS",
    "EncodedPicture",
    "IntensityWindow",
    "flatten",
    "sniff_media_type",
    "to_rgba",
]

try:
    import simplejpeg
except ImportError:  # the extra "fast" is not installed
    simplejpeg = None

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
_SHOWN_BY_BROWSERS = frozenset({"JPEG", "PNG", "WEBP"})  # as their first frame, and upright or not
_TURNS_BY_ITSELF = frozenset({"TIFF", "HEIF"})  # whatever the policy says
REDUCTIONS = (8, 4, 2, 1)
_ORIENTATION = 0x0112  # tag of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED_ON_ITS_SIDE = frozenset({5, 6, 7, 8})
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where Pillow keeps it
_END_OF_JPEG = b"\xff\xd9"


class EncodedPicture:
    """A picture whose size is known and whose pixels are not decoded yet.

    Args:
        data: a file of one of the formats of the policy.
        policy: what decides its pixels.

    Attributes:
        size: (width, height) in pixels, of the full picture as it will be decoded.
        is_truncated: whether decoding found that the file ends too early, and used what there is.

    Raises:
        BadSampleError: if the bytes are another format, their header is damaged, or they claim
            too many pixels or a side 200 times as long as the other.
    """

    def __init__(self, data: bytes, policy: PicturePolicy) -> None:
        self._data = data
        self._policy = policy
        self.is_truncated = False
        with _bad_if_it_fails():
            self._image = open_picture(data, policy)
            self.size: tuple[int, int] = self._image.size
            check_size(self.size, policy.max_image_pixels)
            is_png = self._image.format == "PNG"
            if is_png and self._image.mode == "P" and self._image.palette is None:
                raise BadSampleError("picture has lost its palette")  # Pillow would show black
            self._orientation = 1
            if policy.exif_orientation == "apply":
                self._orientation = self._read_orientation()
        if self._orientation in _TURNED_ON_ITS_SIDE:
            self.size = (self.size[1], self.size[0])

    @property
    def has_transparency(self) -> bool:
        """Whether the header says that there may be transparent pixels."""
        image = self._image
        return (image.mode != "P" or image.palette is not None) and image.has_transparency_data

    @property
    def is_turned(self) -> bool:
        """Whether the policy turns it, as its camera says."""
        return self._orientation != 1

    @property
    def looks_as_stored(self) -> bool:
        """Whether a browser shows the file as ``decode`` does."""
        if self.has_transparency or self._policy.exif_orientation == "apply":
            return False
        is_seen_otherwise = is_deep(self._image) and self._policy.intensity_window is not None
        if is_seen_otherwise or self._image.format not in _SHOWN_BY_BROWSERS:
            return False
        with _bad_if_it_fails():
            return self._read_orientation() == 1

    def decode(self, reduction: int = 1) -> Image.Image:
        """Decode to RGB, once, as the policy says.

        The first frame of an animation is taken, more than 8 bits are rounded to 8.

        Args:
            reduction: 1, 2, 4 or 8: decode a JPEG at this fraction of its width and height,
                rounded up. Other formats come in full.

        Raises:
            BadSampleError: if the bytes are damaged, or values are fractions without a window.
        """
        policy = self._policy
        if self._image.mode == "F" and policy.intensity_window is None:
            raise BadSampleError("picture of fractions needs data.intensity_window")
        with _bad_if_it_fails():
            image = self._decode_fast(reduction)
            if image is None:
                image = flatten(self._load(reduction), policy.transparency, policy.intensity_window)
            return self._upright(image)

    def stored(self) -> Image.Image:
        """Decode in the mode that the file has, such as "P", "LA" or "I;16", with its metadata.

        Raises:
            BadSampleError: if the bytes are damaged.
        """
        with _bad_if_it_fails():
            image = self._decode_fast(1) if self._image.mode == "RGB" else None
            return self._upright(self._load(1).copy() if image is None else image)

    def _decode_fast(self, reduction: int) -> Image.Image | None:
        """Decode a sound plain JPEG by simplejpeg; None leaves it to Pillow."""
        if simplejpeg is None or not self._is_plain_jpeg:
            return None
        width, height = (-(-side // reduction) if reduction > 1 else 0 for side in self._image.size)
        try:
            pixels: np.ndarray = simplejpeg.decode_jpeg(
                self._data,
                colorspace="RGB",
                min_width=width,
                min_height=height,
                min_factor=reduction,
            )
        except ValueError:
            return None  # stricter than Pillow, which has the last word
        image = Image.fromarray(pixels)
        image.info = dict(self._image.info)
        return image

    @property
    def _is_plain_jpeg(self) -> bool:
        return self._image.format == "JPEG" and self._image.mode in ("RGB", "L")

    def _load(self, reduction: int = 1) -> ImageFile:
        """Let Pillow decode, with the remedies that the policy knows for damage."""
        try:
            return self._load_whole(reduction)
        except ValueError:
            bare = without_descriptions(self._data)
            if self._image.format != "PNG" or len(bare) == len(self._data):
                raise
            self._data, self._image = bare, open_picture(bare, self._policy)
            return self._load(reduction)
        except _DECODER_ERRORS:
            if self._policy.truncated_pictures != "use" or not self._cut_losses(reduction):
                raise
            return self._image

    def _load_whole(self, reduction: int) -> ImageFile:
        image = self._image
        if self._is_plain_jpeg and reduction > 1:
            image.draft(
                "RGB", (max(1, image.width // reduction), max(1, image.height // reduction))
            )
        if f"{image.format}".lower() in FORMATS:
            image.load()
            return image
        with seldom_errors(), without_limit(image.size):
            image.load()
        return image

    def _cut_losses(self, reduction: int) -> bool:
        """Take what was decoded before a file ended; False if that is not what is wrong with it."""
        if self._image.format == "PNG" and not has_end(self._data):
            self._image.tile = []  # what is left to decode
            self._image.load()
        elif self._image.format == "JPEG":
            # The decoder fills up what is missing where a file says that it ends.
            whole = self._data[: end_of_segments(self._data)] + _END_OF_JPEG
            self._image = open_picture(whole, self._policy)
            self._load_whole(reduction)
        else:
            return False
        self.is_truncated = True
        return True

    def _read_orientation(self) -> int:
        """Return the orientation of a camera, 1 to 8; 1 if nothing sound says another."""
        if self._image.format in _TURNS_BY_ITSELF:
            return 1
        if self._image.format == "PNG":
            self._load()  # the chunk may follow the pixels
        if not any(name in self._image.info for name in _METADATA):
            return 1
        try:
            check_tags(self._image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
            orientation = self._image.getexif().get(_ORIENTATION, 1)
        except (*_DECODER_ERRORS, BadSampleError):
            return 1
        return orientation if orientation in _TURNS else 1

    def _upright(self, image: Image.Image) -> Image.Image:
        """Turn a picture as its camera says, and take that word out of its metadata."""
        if self._orientation == 1:
            return image
        try:
            return ImageOps.exif_transpose(image)
        except _DECODER_ERRORS:  # metadata that cannot be written again
            turned = image.transpose(_TURNS[self._orientation])
            turned.info = {key: turned.info[key] for key in turned.info if key not in _METADATA}
            return turned


@contextmanager
def _bad_if_it_fails() -> Iterator[None]:
    """Decoding errors inside the block are bad samples."""
    try:
        yield
    except _DECODER_ERRORS as error:
        raise BadSampleError(f"picture cannot be decoded: {error!r}") from error
