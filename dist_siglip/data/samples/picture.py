"""Safe decoding of pictures.

Only the decoders of JPEG, PNG and WebP, and of other formats that a policy names, are offered the
bytes, whatever the member is called; size and shape are read from the header and capped before any
pixel is decoded. Nothing here unpickles, unpacks or executes. Every way the bytes can be wrong ends
in ``BadSampleError``.

A JPEG can be decoded at a half, a quarter or an eighth of its size for a fraction of the time.
Where ``simplejpeg`` is installed it decodes plain JPEGs, to the same pixels as Pillow and with the
same metadata. Pillow's readers are asked by name, not through ``Image.open``, whose limit of pixels
is a second one and warns; it is lifted only while a WebP above it is opened.

Alpha comes in three ways: as a channel (RGBA, LA, WebP), as a share of each entry of a palette,
and as one colour that counts as transparent (the chunk tRNS of a PNG). ``flatten`` lays such
pictures on a colour; ``convert("RGB")`` would show what is hidden.
"""

import io
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture_policy import DROP, FORMATS, PicturePolicy

# Pillow converts modes with premultiplied alpha only back to those without.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


IntensityWindow = tuple[float, float] | None


def flatten(image: Image.Image, transparency: str, window: IntensityWindow = None) -> Image.Image:
    """Return a picture of any mode in RGB; the one given stays as it is.

    Grey of 16 or 32 bits is rounded to 8. What is laid on a colour c has channels
    ``alpha * channel + (1 - alpha) * c``, rounded, as ``PIL.Image.alpha_composite`` does it.

    Args:
        image: any mode.
        transparency: as ``PicturePolicy.transparency``.
        window: as ``PicturePolicy.intensity_window``.

    Raises:
        BadSampleError: if its values are fractions and there is no window.

    Example:
        >>> hidden_red = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
        >>> flatten(hidden_red, "#0000ff").getpixel((0, 0))
        (0, 0, 255)
        >>> flatten(hidden_red, "drop").getpixel((0, 0))
        (255, 0, 0)
    """
    if transparency == DROP or not image.has_transparency_data:
        return _without_alpha(image, window)
    layer = to_rgba(image, window)
    if layer.getchannel("A").getextrema() == (255, 255):
        return _without_alpha(layer, window)
    ground = Image.new("RGBA", layer.size, transparency)
    flat = Image.alpha_composite(ground, layer).convert("RGB")
    flat.info = {name: layer.info[name] for name in layer.info if name != "transparency"}
    return flat


def to_rgba(image: Image.Image, window: IntensityWindow = None) -> Image.Image:
    """Return a picture of any mode in RGBA, opaque where it says nothing of transparency.

    Args:
        image: any mode.
        window: as ``flatten``.

    Example:
        >>> to_rgba(Image.new("L", (1, 1), 7)).getpixel((0, 0))
        (7, 7, 7, 255)
    """
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.mode == "RGBA":
        return image
    if not _is_deep(image):
        return image.convert("RGBA")
    layer = _without_alpha(image, window).convert("RGBA")
    key = image.info.get("transparency")
    if key is not None:
        layer.putalpha(Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)))
    return layer


def _without_alpha(image: Image.Image, window: IntensityWindow) -> Image.Image:
    """Return the colours alone, those of transparent places too."""
    if _is_deep(image):
        image = _to_8_bits(image, window)
    elif image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    elif image.mode == "P" and "transparency" in image.info:
        image = image.copy()  # Pillow warns of entries with alpha when it converts them
        del image.info["transparency"]
    flat = image.convert("RGB")
    flat.info.pop("transparency", None)
    return flat


def _is_deep(image: Image.Image) -> bool:
    """Whether a picture is grey of more than 8 bits: modes "I", "I;16", "F" and their like."""
    return image.mode[0] in "IF"


def _to_8_bits(image: Image.Image, window: IntensityWindow) -> Image.Image:
    """Round grey values of more than 8 bits to 8; Pillow would cut them off at 255."""
    values = np.asarray(image)
    if window is not None and values.dtype.kind == "u" and values.dtype.itemsize == 2:
        grey = _spread(np.arange(1 << 16, dtype=np.float64), window)[values]
    elif window is not None:
        grey = _spread(values.astype(np.float32), window)
    elif image.mode == "F":
        raise BadSampleError("picture of fractions needs data.intensity_window")
    else:
        grey = values.clip(0, 65535).astype(np.uint32)
        grey += 128
        grey //= 257
    rounded = Image.fromarray(grey.astype(np.uint8))
    rounded.info = dict(image.info)
    rounded.info.pop("transparency", None)
    return rounded


def _spread(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Spread the values of a window evenly over 8 bits, and cut off what is beyond."""
    low, high = window
    return np.rint(255 * np.nan_to_num((values - low) / (high - low)).clip(0, 1)).astype(np.uint8)


_MOST_BLOCKS_OF_GIF = 1 << 16
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DESCRIPTIONS = frozenset({b"iCCP", b"tEXt", b"zTXt", b"iTXt"})  # chunks that no pixel depends on
_SEGMENTS_OF_JPEG = (b"\xff\xc4", b"\xff\xda", b"\xff\xdb", b"\xff\xdd")  # before and between scans


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
        BadSampleError: if the frame begins behind 65,536 blocks, or bytes that are none.
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


try:
    import simplejpeg
except ImportError:  # the extra "fast" is not installed
    simplejpeg = None

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
# And readers of formats that are read on request.
_SELDOM_ERRORS = (AssertionError, AttributeError, RuntimeError, ArithmeticError, NameError)
_MOST_RUN_LENGTHS = 4_000_000  # pixels of a BMP that Pillow unpacks byte by byte, in Python
_SHOWN_BY_BROWSERS = frozenset({"JPEG", "PNG", "WEBP"})  # as their first frame, and upright or not
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
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
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
_TURNED_ON_ITS_SIDE = frozenset({5, 6, 7, 8})
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where Pillow keeps it
_END_OF_JPEG = b"\xff\xd9"
# Bits of the values of a PNG by Pillow's raw mode, and what brings them to 8.
_SCALES = {"L;2": (2, 85), "L;4": (4, 17), "L": (8, 1)}
_LIMIT_OF_PILLOW = threading.Lock()


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
            self._image = _open(data, policy)
            self.size: tuple[int, int] = self._image.size
            _check_size(self.size, policy.max_image_pixels)
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
        is_seen_otherwise = _is_deep(self._image) and self._policy.intensity_window is not None
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
            BadSampleError: if the bytes are damaged.
        """
        with _bad_if_it_fails():
            image = self._decode_fast(reduction)
            if image is None:
                policy = self._policy
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
            self._data, self._image = bare, _open(bare, self._policy)
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
        with _seldom_errors(), _without_limit(image.size):
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
            self._image = _open(whole, self._policy)
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
            orientation = self._image.getexif().get(_ORIENTATION, 1)
        except _DECODER_ERRORS:
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


def _open(data: bytes, policy: PicturePolicy) -> ImageFile:
    """Read the header by the one reader that the first bytes call for."""
    media_type = sniff_media_type(data)
    name = media_type.removeprefix("image/")
    if name not in policy.formats:
        raise BadSampleError(
            f"picture cannot be decoded: {_no_file_of(policy.formats)} but {name}, which "
            "data.formats does not name"
        )
    if name not in FORMATS:
        with _seldom_errors():
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
    _check_size(size, max_pixels)
    with _without_limit(size):
        return WebPImagePlugin.WebPImageFile(io.BytesIO(data))


def _open_seldom(name: str, data: bytes, max_pixels: int) -> ImageFile:
    """Read the header of a format that is read on request."""
    stream = io.BytesIO(data)
    if name == "gif":
        size = gif_size(data)
        _check_size(size, max_pixels)
        with _without_limit(size):
            return GifImagePlugin.GifImageFile(stream)
    if name == "bmp":
        image: ImageFile = BmpImagePlugin.BmpImageFile(stream)
        if image.tile[0][0] == "bmp_rle":
            _check_size(image.size, min(max_pixels, _MOST_RUN_LENGTHS))
        return image
    if name == "tiff":
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
def _seldom_errors() -> Iterator[None]:
    """Turn what only readers of seldom formats raise into an error of values."""
    try:
        yield
    except _SELDOM_ERRORS as error:
        raise ValueError(repr(error)) from error


@contextmanager
def _without_limit(size: tuple[int, int]) -> Iterator[None]:
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


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
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


@contextmanager
def _bad_if_it_fails() -> Iterator[None]:
    """Decoding errors inside the block are bad samples."""
    try:
        yield
    except _DECODER_ERRORS as error:
        raise BadSampleError(f"picture cannot be decoded: {error!r}") from error
