"""What does one row of a table become inside a shard?

The bytes of the picture as they are, under the extension that they themselves call for, or, if it
is larger than wanted, a smaller JPEG; and its captions. Nothing gets in that training would
replace: the picture is decoded and the caption read the way training does it.

A picture made smaller has the pixels that training with the same policy would have seen in the
original. Where that applies the orientation of cameras, turned pictures are written upright.
"""

import io
import json
import os
import stat
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from dist_siglip.data.packing.table import Row
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import decode_caption, field_of, read_json, texts_of
from dist_siglip.data.samples.picture import EncodedPicture, sniff_media_type
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.errors import UserError

_EXTENSIONS = {
    "image/jpeg": "jpg",
    "image/png": "png",
    "image/webp": "webp",
}
_LARGEST_FILE = 1 << 28  # bytes; what the reader of shards agrees to


@dataclass(frozen=True, kw_only=True)
class SampleMaker:
    """Turn rows into samples; safe to call from several threads.

    Attributes:
        images: folder that relative picture paths count from.
        allow_outside: accept pictures that lie outside it.
        resize_short_side: longest short side, in pixels; None keeps every picture.
        jpeg_quality: of pictures made smaller.
        pictures: what decides the pixels of an encoded picture.
        keep_others: add a ``.json`` with the other columns.
    """

    images: str
    allow_outside: bool = False
    resize_short_side: int | None = None
    jpeg_quality: int = 90
    pictures: PicturePolicy = field(default_factory=PicturePolicy)
    keep_others: bool = False

    def __call__(self, row: Row) -> dict[str, Any]:
        """Return the members of a row as webdataset's writer takes them.

        The ``.txt`` holds the first caption, the ``.cls`` the number of a class. Several different
        captions, and other columns, are in the ``.json``: the captions as a list under "caption".

        Raises:
            BadSampleError: if the picture or a caption cannot be used.
            UserError: if the picture lies outside the folder.
        """
        if row.problem is not None:
            raise BadSampleError(row.problem)
        picture = row.data
        if picture is None:
            picture = read_regular_file(self._resolve(row.picture, row.number))
        elif len(picture) > _LARGEST_FILE:
            raise BadSampleError(f"picture of {len(picture)} bytes, at most {_LARGEST_FILE}")
        encoded = EncodedPicture(picture, self.pictures)
        image = encoded.decode()
        extension = _EXTENSIONS[sniff_media_type(picture)]
        is_large = self.resize_short_side is not None and min(image.size) > self.resize_short_side
        if self.resize_short_side is not None and is_large:
            image = shrink(image, self.resize_short_side)
        if is_large or encoded.is_turned:
            picture, extension = encode_jpeg(image, self.jpeg_quality), "jpg"
        others = dict(row.others)
        captions = [_encode(text) for text in row.captions]
        if row.caption_path is not None:
            captions = [read_regular_file(self._resolve(row.caption_path, row.number))]
            if row.caption_path.endswith(".json"):
                others = read_json(captions[0])
                found = texts_of(field_of(others, "caption"), "caption")
                captions = [text.encode() for text in found if text.strip()]
                others.pop("caption", None)
        if not captions and row.label is None:
            raise BadSampleError("caption is empty")
        texts = list(dict.fromkeys(decode_caption(caption) for caption in captions))
        sample: dict[str, Any] = {"__key__": f"{row.number:09d}", extension: picture}
        if captions:
            sample["txt"] = captions[0]
        if row.label is not None:
            sample["cls"] = str(row.label).encode()
        if len(texts) > 1:
            if "caption" in others:
                raise UserError(
                    f"row {row.number} has several captions and another column named 'caption'; "
                    "name it in caption_column too, or leave keep_columns off"
                )
            others["caption"] = texts
        if others or self.keep_others:
            sample["json"] = json.dumps(others, default=str).encode()
        return sample

    def _resolve(self, path: str, number: int) -> str:
        """Follow every link of a path, and refuse where it leads outside the folder."""
        try:
            real = os.path.realpath(os.path.join(self.images, path))
        except ValueError as error:  # a NUL, or what no file name can hold
            raise BadSampleError(f"path {path!r} cannot be a path") from error
        root = os.path.join(os.path.realpath(self.images), "")
        if not self.allow_outside and not real.startswith(root):
            raise UserError(
                f"picture {path!r} of row {number} lies outside the images folder "
                f"({self.images}); correct the table, or pass --allow_outside true if it is to be "
                "trusted"
            )
        return real


def read_regular_file(path: str) -> bytes:
    """Read a file whole; devices and pipes, which may have no end, are not opened.

    Raises:
        BadSampleError: if it is missing, closed to us, no regular file, or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadSampleError("not a regular file")
            if status.st_size > _LARGEST_FILE:
                raise BadSampleError(f"file of {status.st_size} bytes, at most {_LARGEST_FILE}")
            return file.read()
    except OSError as error:
        raise BadSampleError(
            f"{os.path.basename(path)!r} cannot be read: {error.strerror}"
        ) from error


def _encode(caption: str) -> bytes:
    """Give back the bytes that a table held."""
    try:
        return caption.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:  # half a character, written as an escape in JSON
        raise BadSampleError(f"caption is not UTF-8: {error.reason}") from error


def shrink(image: Image.Image, short_side: int) -> Image.Image:
    """Make a picture smaller so that its short side has so many pixels, keeping its shape.

    Bicubic with antialiasing; the long side is rounded to whole pixels.

    Example:
        >>> shrink(Image.new("RGB", (640, 480)), 120).size
        (160, 120)
    """
    width, height = image.size
    scale = short_side / min(width, height)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode a picture as a baseline JPEG without any metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, exif=b"")
    return buffer.getvalue()
