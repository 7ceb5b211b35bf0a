"""Pictures and captions of a table or a folder, written as webdataset shards.

webdataset's ``ShardWriter`` decides where one shard ends and the next begins. Each is written under
a hidden name, synced, renamed, and then ``pack.json`` records how many rows are done. So a shard is
whole or not there, and packing that was killed goes on with the first row that is in no shard: the
bytes are the same as without a kill, for any number of workers. Keys are row numbers, and rows that
cannot be used are listed in ``pack_skipped.jsonl``.

A picture keeps its bytes, under the extension that they call for, or, if it is larger than wanted,
becomes a smaller JPEG with the pixels that training by the same policy would have seen. Nothing
gets in that training would replace.
"""

import io
import json
import logging
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from dist_siglip.data.index.damage import MAX_BAD_FRACTION
from dist_siglip.data.packing.columnar import columnar_files, hold_pictures
from dist_siglip.data.packing.folder import PackFolder
from dist_siglip.data.packing.table import (
    Columns,
    Row,
    check_table,
    digest_table,
    read_rows,
    resolve,
)
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import decode_caption, field_of, read_json, texts_of
from dist_siglip.data.samples.picture import EncodedPicture, sniff_media_type
from dist_siglip.data.samples.picture_policy import (
    BEFORE_THE_SETTINGS,
    EXTENSIONS_OF,
    PicturePolicy,
)
from dist_siglip.errors import UserError, check_least

_LOGGER = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 10_000
MAX_SHARD_MIB = 1024
JPEG_QUALITY = 90
_LARGEST_FILE = 1 << 28  # bytes; what the reader of shards agrees to


_AHEAD = 8  # samples prepared ahead by each worker; bounds memory
_EARLY_ROWS = 1000  # rows before the share of bad ones is judged for the first time
_MEBIBYTE = 1 << 20


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
    jpeg_quality: int = JPEG_QUALITY
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
        extension = EXTENSIONS_OF[sniff_media_type(picture).removeprefix("image/")][0]
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
            real, is_inside = resolve(self.images, path)
        except ValueError as error:
            raise BadSampleError(f"path {path!r} cannot be a path") from error
        if not self.allow_outside and not is_inside:
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


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What decides the bytes of the shards.

    Attributes:
        columns: which columns hold what.
        samples_per_shard: most samples of a shard.
        max_shard_mib: a shard that has reached so many MiB takes no further sample.
        resize_short_side: longest short side of a picture, in pixels; None keeps all as they are.
        jpeg_quality: of pictures made smaller, 1 to 95.
        shuffle_seed: of a random order of the rows; None keeps the order of the table.
        pictures: what decides the pixels of an encoded picture, and which can be used.

    Raises:
        UserError: if a number is out of its range.
    """

    columns: Columns = field(default_factory=Columns)
    samples_per_shard: int = SAMPLES_PER_SHARD
    max_shard_mib: int = MAX_SHARD_MIB
    resize_short_side: int | None = None
    jpeg_quality: int = JPEG_QUALITY
    shuffle_seed: int | None = None
    pictures: PicturePolicy = field(default_factory=PicturePolicy)

    def __post_init__(self) -> None:
        names = ("samples_per_shard", "max_shard_mib", "resize_short_side", "jpeg_quality")
        check_least(1, **{name: getattr(self, name) for name in names})
        check_least(0, shuffle_seed=self.shuffle_seed)
        if self.jpeg_quality > 95:
            raise UserError(f"jpeg_quality ({self.jpeg_quality}) must be at most 95")


class PackReport(NamedTuple):
    """What packing left behind, over all calls: shards, rows read, samples, rows skipped."""

    shards: int
    rows: int
    samples: int
    skipped: int


def pack(
    table: Path,
    out: Path,
    settings: PackSettings,
    *,
    images: Path | None = None,
    allow_outside: bool = False,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    workers: int = 2,
) -> PackReport:
    """Write the pictures and captions of a table as shards, or go on where it stopped.

    Args:
        table: CSV, TSV, JSONL or Parquet file, or a folder of pictures with captions beside
            them.
        out: folder of the shards; new, empty, or left by an interrupted call with the same
            table and settings.
        settings: what decides the bytes.
        images: folder that relative paths count from and that every picture lies in; None
            takes the folder of the table.
        allow_outside: accept pictures outside that folder.
        max_bad_fraction: share of the rows that may be unusable; judged after 1000 rows, and at
            the end.
        workers: threads that read, decode and encode.

    Raises:
        UserError: if a setting or the table is wrong, the folder holds something else, a picture
            lies outside, or too many rows cannot be used.
    """
    if workers < 1:
        raise UserError(f"workers ({workers}) must be at least 1")
    if not 0 <= max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction ({max_bad_fraction}) must be in [0, 1]")
    root = images or (table if table.is_dir() else table.parent)
    if not root.is_dir():
        raise UserError(f"images ({root}) is not a folder")
    columns = settings.columns
    files = columnar_files(table)
    if table.is_dir() and not files and (columns.keep_others or columns.label is not None):
        name = "keep_columns" if columns.keep_others else "class_column"
        raise UserError(f"{name} needs a table; a folder has no columns")
    if not columns.captions and columns.label is None:
        raise UserError("caption_column (null) needs a class_column; name the column of captions")
    check_table(table, columns)
    if settings.shuffle_seed is not None and hold_pictures(files, columns.image):
        raise UserError(
            f"shuffle_seed ({settings.shuffle_seed}) needs all rows in memory, and {table.name} "
            "holds the pictures themselves; leave it out: training shuffles"
        )
    maker = SampleMaker(
        images=str(root),
        allow_outside=allow_outside,
        resize_short_side=settings.resize_short_side,
        jpeg_quality=settings.jpeg_quality,
        pictures=settings.pictures,
        keep_others=settings.columns.keep_others,
    )
    identity = _identity(table, root, settings)
    with PackFolder(out, identity) as folder:
        _LOGGER.info("packing %s into %s from row %d on", table, out, folder.progress.rows)
        if not folder.progress.finished:
            rows = _rows_from(folder.progress.rows, table, settings)
            _write(folder, rows, maker, settings, max_bad_fraction, workers)
        _judge(folder, max_bad_fraction, 1)
        done = folder.progress
    return PackReport(done.shards, done.rows, done.samples, done.skipped)


def _write(
    folder: PackFolder,
    rows: Iterable[Row],
    maker: SampleMaker,
    settings: PackSettings,
    max_bad_fraction: float,
    workers: int,
) -> None:
    """Write what is left of the rows."""
    with folder.shards(settings.samples_per_shard, settings.max_shard_mib * _MEBIBYTE) as write:
        for row, outcome in _prepared(rows, maker, workers):
            try:
                sample = outcome()
            except BadSampleError as error:
                folder.skip({"row": row.number, "picture": row.picture, "reason": str(error)})
            else:
                write(sample)
            _judge(folder, max_bad_fraction, _EARLY_ROWS)
    folder.finish()


def _prepared(
    rows: Iterable[Row], maker: SampleMaker, workers: int
) -> Iterator[tuple[Row, Callable[[], dict[str, Any]]]]:
    """Prepare samples in threads, a few ahead of what is written; the order stays.

    Threads suffice: Pillow decodes, resizes and encodes without the interpreter's lock. They end
    with this process, however it ends.
    """
    ahead: deque[tuple[Row, Future[dict[str, Any]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")
    try:
        for row in rows:
            ahead.append((row, pool.submit(maker, row)))
            if len(ahead) >= _AHEAD * workers:
                first, future = ahead.popleft()
                yield first, future.result
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result
    finally:
        pool.shutdown(cancel_futures=True)


def _rows_from(first: int, table: Path, settings: PackSettings) -> Iterable[Row]:
    """Read the rows that are left, or shuffle all, which then are in memory."""
    if settings.shuffle_seed is None:
        return read_rows(table, settings.columns, first)
    everything = list(read_rows(table, settings.columns))
    generator = np.random.Generator(np.random.Philox(key=[settings.shuffle_seed, 0]))
    return (everything[place] for place in generator.permutation(len(everything))[first:])


def _judge(folder: PackFolder, max_bad_fraction: float, least_rows: int) -> None:
    """Stop if the share of rows that cannot be used is above the limit."""
    seen = folder.seen
    if seen.skipped > max_bad_fraction * max(seen.rows, least_rows):
        raise UserError(
            f"max_bad_fraction ({max_bad_fraction}) is exceeded: {seen.skipped} of {seen.rows} "
            f"rows cannot be used, listed in {folder.path / 'pack_skipped.jsonl'}, first "
            f"{folder.first_skipped()}; mend them and pack into a new folder, or raise it"
        )


def _identity(table: Path, root: Path, settings: PackSettings) -> dict[str, Any]:
    """Everything that decides the bytes of the shards, as plain values by name."""
    values = asdict(settings)
    columns = settings.columns
    del values["columns"], values["pictures"]
    policy = {**asdict(settings.pictures), "formats": list(settings.pictures.formats)}
    if settings.resize_short_side is None:  # then they decide no byte
        del policy["transparency"], policy["intensity_window"]
    # Folders of before there was a choice go on.
    values |= {key: policy[key] for key in policy if policy[key] != BEFORE_THE_SETTINGS.get(key)}
    if settings.resize_short_side is not None:  # another JPEG encoder writes other bytes
        values["pillow"] = PIL.__version__
    return {
        "table": table.name,
        "table_digest": digest_table(table, columns),
        "images": os.path.realpath(root),
        "image_column": columns.image,
        "caption_column": list(columns.captions),
        "keep_columns": columns.keep_others,
        **({} if columns.label is None else {"class_column": columns.label}),
        **values,
    }


__all__ = ["PackReport", "PackSettings", "pack"]
