"""``data pack``: a table and its pictures, or a folder, become shards."""

import json as json_text
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dist_siglip.cli.table import print_path
from dist_siglip.data.index.damage import MAX_BAD_FRACTION
from dist_siglip.data.packing.pack import (
    JPEG_QUALITY,
    MAX_SHARD_MIB,
    SAMPLES_PER_SHARD,
    PackSettings,
)
from dist_siglip.data.packing.pack import pack as write_shards
from dist_siglip.data.packing.table import Columns
from dist_siglip.data.samples.picture_policy import (
    MAX_IMAGE_PIXELS,
    ExifOrientation,
    PicturePolicy,
    TruncatedPictures,
)


def pack(
    table: str,
    out: str,
    images: str | None = None,
    image_column: str = "image",
    caption_column: str | list[str] | None = "caption",
    class_column: str | None = None,
    keep_columns: bool = False,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    max_shard_mib: int = MAX_SHARD_MIB,
    resize_short_side: int | None = None,
    jpeg_quality: int = JPEG_QUALITY,
    shuffle_seed: int | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    transparency: str = PicturePolicy.transparency,
    exif_orientation: ExifOrientation = "ignore",
    truncated_pictures: TruncatedPictures = "replace",
    max_bad_fraction: float = MAX_BAD_FRACTION,
    allow_outside: bool = False,
    workers: int = 2,
    json: bool = False,
) -> int:
    """Write webdataset shards of pictures and captions; called again, go on where it stopped.

    A row gives the members <row number>.jpg (or .png, .webp, by content), .txt (the caption), .cls
    (the number of a class) if there is a class_column, and .json where there are several captions
    (a list under "caption") or columns are kept. Rows that cannot be used are listed in
    pack_skipped.jsonl.

    Args:
        table: .csv, .tsv, .jsonl or .parquet file, or a folder of pictures with same-named .txt
            files, or .json files with a "caption".
        out: folder of the shards.
        images: folder that relative picture paths count from. Null takes the table's.
        image_column: column with the path of the picture; or, in Parquet, with the picture: bytes,
            or bytes and path as the datasets library writes them.
        caption_column: column with the caption or a list of captions; or several columns. Null, for
            zero-shot classification alone, writes no captions.
        class_column: column with the number of a class, from 0. Null writes no classes.
        keep_columns: put the other columns into a .json member.
        samples_per_shard: most samples of a shard.
        max_shard_mib: a shard that has reached so many MiB takes no further sample.
        resize_short_side: make pictures with a longer short side smaller (bicubic, as JPEG), in
            pixels. Null keeps the bytes of every picture.
        jpeg_quality: of pictures made smaller.
        shuffle_seed: pack in a random order of this seed; all rows are in memory then. Null keeps
            the order of the table.
        max_image_pixels: pictures with more pixels are skipped.
        transparency: colour that transparent pictures are laid on when they are made smaller,
            "#rrggbb" or a name; or drop: their alpha is left out.
        exif_orientation: ignore what a camera says of up and down, or apply it: then turned
            pictures are written upright, as JPEG.
        truncated_pictures: JPEGs and PNGs that end too early are skipped ("replace"), or packed
            ("use"), for training with data.truncated_pictures: use.
        max_bad_fraction: share of the rows that may be skipped.
        allow_outside: accept pictures outside the images folder, by "..", absolute path or link.
        workers: threads that read, check and resize.
        json: print JSON instead of a table.
    """
    started = time.monotonic()
    columns = [caption_column] if isinstance(caption_column, str) else caption_column or []
    report = write_shards(
        Path(table),
        Path(out),
        PackSettings(
            columns=Columns(image_column, tuple(columns), keep_columns, class_column),
            samples_per_shard=samples_per_shard,
            max_shard_mib=max_shard_mib,
            resize_short_side=resize_short_side,
            jpeg_quality=jpeg_quality,
            shuffle_seed=shuffle_seed,
            pictures=PicturePolicy(
                transparency=transparency,
                exif_orientation=exif_orientation,
                truncated_pictures=truncated_pictures,
                max_image_pixels=max_image_pixels,
            ),
        ),
        images=None if images is None else Path(images),
        allow_outside=allow_outside,
        max_bad_fraction=max_bad_fraction,
        workers=workers,
    )
    seconds = time.monotonic() - started
    if json:
        content = {"out": out, **report._asdict(), "seconds": seconds}
        sys.stdout.write(json_text.dumps(content, indent=2) + "\n")
        return 0
    shown = Table(caption=f"this call took {seconds:.1f} s")
    for heading in report._fields:
        shown.add_column(heading, justify="right")
    shown.add_row(*(f"{count:,}" for count in report))
    Console().print(shown)
    print_path("packed into", out)
    return 0
