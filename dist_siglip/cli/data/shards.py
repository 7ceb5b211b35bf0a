"""``data index`` and ``data check`` of shards; ``data pack`` of a table or a folder to shards."""

import json as json_text
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from dist_siglip.cli import EXIT_SAVED
from dist_siglip.cli.table import print_path
from dist_siglip.data.index.damage import MAX_BAD_FRACTION
from dist_siglip.data.index.read import read_index
from dist_siglip.data.inspect import (
    HARMLESS,
    KINDS,
    UNREACHABLE,
    Finding,
    Inspector,
    keys_in_several_shards,
)
from dist_siglip.data.packing import JPEG_QUALITY, MAX_SHARD_MIB, SAMPLES_PER_SHARD, PackSettings
from dist_siglip.data.packing import pack as write_shards
from dist_siglip.data.packing.duplicates import report_duplicates
from dist_siglip.data.packing.table import Columns
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.data.remote.locations import shard_name
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import (
    FORMATS,
    MAX_IMAGE_PIXELS,
    PICTURE_EXTENSIONS,
    ExifOrientation,
    PictureFormat,
    PicturePolicy,
    TruncatedPictures,
    with_formats,
)
from dist_siglip.data.urls import expand_shards
from dist_siglip.distributed import World
from dist_siglip.errors import OutageError, UserError, check_least
from dist_siglip.system.atomic import open_atomically
from dist_siglip.system.process_pool import map_isolated
from dist_siglip.system.redaction import redact

_EXAMPLES = 3
_REASON = 400  # characters of a reason in the table
_MOST_AT_ONCE = 8  # shards indexed by one process
_SHOWN = 20  # damaged shards, and remarks, under the table


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
    formats: tuple[PictureFormat, ...] = FORMATS,
    intensity_window: tuple[float, float] | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    allow_outside: bool = False,
    duplicates: bool = False,
    workers: int = 2,
    json: bool = False,
) -> int:
    """Write webdataset shards of pictures and captions; called again, go on where it stopped.

    A row gives the members <row number>.jpg (or .png, .webp, by content), .txt (the caption), .cls
    (the number of a class) if there is a class_column, and .json where there are several captions
    (a list under "caption") or columns are kept. Rows that cannot be used are listed in
    pack_skipped.jsonl.

    Args:
        table: .csv, .tsv, .jsonl, .parquet or .arrow file; several of the last two, as the datasets
            library exports them, by their folder or a pattern in quotes; or a folder of pictures
            with same-named .txt files, or .json files with a "caption".
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
        formats: of pictures that are packed, see data.formats of a run.
        intensity_window: values of grey pictures of more than 8 bits that become black and white
            when they are made smaller, [low, high]. Null: 0 and 65535.
        max_bad_fraction: share of the rows that may be skipped.
        allow_outside: accept pictures outside the images folder, by "..", absolute path or link.
        duplicates: look through the finished shards for equal pictures, pictures that are alike,
            equal captions and equal pairs, and list them in pack_duplicates.jsonl.
        workers: threads that read, check and resize.
        json: print JSON instead of a table.
    """
    started = time.monotonic()
    pictures = PicturePolicy(
        transparency=transparency,
        exif_orientation=exif_orientation,
        truncated_pictures=truncated_pictures,
        max_image_pixels=max_image_pixels,
        formats=formats,
        intensity_window=intensity_window,
    )
    columns = [caption_column] if isinstance(caption_column, str) else caption_column or []
    report = write_shards(
        Path(table),
        Path(out),
        PackSettings(
            columns=Columns(
                image_column,
                tuple(columns),
                keep_columns,
                class_column,
                with_formats(PICTURE_EXTENSIONS, formats),
            ),
            samples_per_shard=samples_per_shard,
            max_shard_mib=max_shard_mib,
            resize_short_side=resize_short_side,
            jpeg_quality=jpeg_quality,
            shuffle_seed=shuffle_seed,
            pictures=pictures,
        ),
        images=None if images is None else Path(images),
        allow_outside=allow_outside,
        max_bad_fraction=max_bad_fraction,
        workers=workers,
    )
    twice: dict[str, int] = {}
    if duplicates:
        found = report_duplicates(
            expand_shards(out), Path(out) / "pack_duplicates.jsonl", pictures, workers=workers
        )
        twice = {f"shared_{name}": count for name, count in found._asdict().items()}
    counts = {**report._asdict(), **twice}
    seconds = time.monotonic() - started
    if json:
        content = {"out": out, **counts, "seconds": seconds}
        sys.stdout.write(json_text.dumps(content, indent=2) + "\n")
        return 0
    shown = Table(caption=f"this call took {seconds:.1f} s")
    for heading in counts:
        shown.add_column(heading.replace("_", " "), justify="right")
    shown.add_row(*(f"{count:,}" for count in counts.values()))
    Console().print(shown)
    print_path("packed into", out)
    return 0


def check(
    shards: str | list[str],
    captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
    image_extensions: tuple[str, ...] = PICTURE_EXTENSIONS,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    truncated_pictures: TruncatedPictures = "replace",
    formats: tuple[PictureFormat, ...] = FORMATS,
    intensity_window: tuple[float, float] | None = None,
    decode: bool = True,
    workers: int = 2,
    limit_seconds: float = 3600.0,
    cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen dataclass
    out: str | None = None,
    json: bool = False,
) -> int:
    """Look at every sample of shards as training would; exit code 1 if anything is damaged.

    Else exit code 75 if a shard is out of reach for the moment.

    Args:
        shards: file, folder, pattern, list file or URL, or a JSON list of these.
        captions: where captions are.
        image_extensions: members that are the picture of a sample, in order of preference.
        max_image_pixels: pictures with more pixels are bad.
        truncated_pictures: whether JPEGs and PNGs that end too early are bad ("replace"), or
            used as far as they go ("use").
        formats: of pictures that are decoded, see data.formats of a run.
        intensity_window: as data.intensity_window of a run; pictures of fractions need one.
        decode: decode every picture; otherwise only headers are read.
        workers: processes.
        limit_seconds: longest time for one shard.
        cache: copies of remote shards.
        out: file for a JSON line about every finding. Null writes none.
        json: print JSON instead of a table.
    """
    captions.check()
    cache.check()
    paths = expand_shards(shards)
    inspector = Inspector(
        image_extensions=with_formats(image_extensions, formats),
        captions=captions,
        pictures=PicturePolicy(
            max_image_pixels=max_image_pixels,
            truncated_pictures=truncated_pictures,
            formats=formats,
            intensity_window=intensity_window,
        ),
        decode=decode,
        cache=ShardCache(cache),
    )
    findings: list[Finding] = []
    hashes: dict[str, np.ndarray] = {}
    num_samples = num_transparent = 0
    for done in map_isolated(inspector, paths, workers=workers, limit_seconds=limit_seconds):
        if done.result is None:
            findings.append(Finding("damaged shard", done.item, "", done.failure))
            continue
        findings += done.result.findings
        num_samples += done.result.num_samples
        num_transparent += done.result.num_transparent
        hashes[done.item] = done.result.key_hashes
    order = {path: number for number, path in enumerate(paths)}
    findings.sort(key=lambda finding: order[finding.shard])
    counts = Counter(finding.kind for finding in findings)
    if shared := keys_in_several_shards(hashes):
        counts["key in several shards"] = shared
    if num_transparent:
        counts["transparent picture"] = num_transparent
    if out is not None:
        with open_atomically(Path(out)) as file:
            for finding in findings:
                line = {**finding._asdict(), "shard": redact(finding.shard)}
                file.write((json_text.dumps(line) + "\n").encode())
    is_damaged = any(kind not in HARMLESS | {UNREACHABLE} for kind in counts)
    if json:
        content = {
            "shards": len(paths),
            "samples": num_samples,
            "damaged": is_damaged,
            "findings": {kind: counts[kind] for kind in KINDS if counts[kind]},
        }
        sys.stdout.write(json_text.dumps(content, indent=2) + "\n")
    else:
        Console().print(_table(findings, counts, len(paths), num_samples))
    return 1 if is_damaged else EXIT_SAVED if counts[UNREACHABLE] else 0


def _table(
    findings: list[Finding], counts: Counter[str], num_shards: int, num_samples: int
) -> Table:
    table = Table(title=f"{num_samples:,} samples of {num_shards:,} shards")
    table.add_column("finding")
    table.add_column("count", justify="right")
    table.add_column("in training")
    table.add_column("first", overflow="fold")
    for kind, consequence in KINDS.items():
        if not counts[kind]:
            continue
        first = [f for f in findings if f.kind == kind][:_EXAMPLES]
        shown = "\n".join(
            f"{shard_name(f.shard)}{'/' if f.key else ''}{f.key}: {redact(f.reason)[:_REASON]}"
            for f in first
        )
        table.add_row(
            kind, f"{counts[kind]:,}", consequence, ascii(shown)[1:-1].replace("\\n", "\n")
        )
    if not counts:
        table.add_row("nothing", "0", "", "")
    return table


def index(
    shards: str | list[str],
    workers: int = 2,
    rebuild: bool = False,
    cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen dataclass
    json: bool = False,
) -> int:
    """Write a side-car <shard>.idx.npz for every shard that has none; exit code 1 on damage.

    Else exit code 75 if a shard is out of reach for the moment.
    Started by torchrun or srun, each process takes its share of the shards.

    Args:
        shards: file, folder, pattern, list file or URL, or a JSON list of these.
        workers: processes.
        rebuild: scan shards that have a side-car, too.
        cache: copies of remote shards.
        json: print JSON instead of a table.
    """
    cache.check()
    check_least(1, workers=workers)
    started = time.monotonic()
    world = World.detect()
    mine = expand_shards(shards)[world.rank :: world.world_size]
    read = partial(_read_all, rebuild=rebuild, cache=ShardCache(cache))
    size = max(1, min(_MOST_AT_ONCE, len(mine) // (2 * workers)))
    chunks = [mine[i : i + size] for i in range(0, len(mine), size)]
    num_samples = num_members = 0
    damage: list[str] = []
    remarks: list[str] = []
    lost: list[str] = []
    for done in map_isolated(read, chunks, workers=workers):
        if done.result is None:
            damage.append(f"shards from {redact(done.item[0])!r} on: {done.failure}")
            continue
        for one in done.result:
            num_samples += one.num_samples
            num_members += one.num_members
            for lines, line in ((damage, one.damage), (remarks, one.remark), (lost, one.lost)):
                lines += [line] if line else []
    seconds = time.monotonic() - started
    code = 1 if damage else EXIT_SAVED if lost else 0
    if json:
        content = {
            "shards": len(mine),
            "samples": num_samples,
            "members": num_members,
            "damaged": damage,
            "remarks": remarks,
            "unreachable": lost,
            "seconds": seconds,
        }
        sys.stdout.write(json_text.dumps(content, indent=2) + "\n")
        return code
    table = Table(title=f"indexed in {seconds:.1f} s, {len(mine) / seconds:,.0f} shards/s")
    for heading in ("shards", "samples", "members", "damaged"):
        table.add_column(heading, justify="right")
    table.add_row(f"{len(mine):,}", f"{num_samples:,}", f"{num_members:,}", f"{len(damage):,}")
    console = Console()
    console.print(table)
    for line in (*damage[:_SHOWN], *lost[:_SHOWN], *remarks[:_SHOWN]):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return code


class _Indexed(NamedTuple):
    """What is known of one shard: counts, and a line each about what is the matter with it."""

    num_samples: int = 0
    num_members: int = 0
    damage: str = ""
    remark: str = ""
    lost: str = ""


def _read_all(shards: list[str], rebuild: bool, cache: ShardCache) -> list[_Indexed]:
    """Index some shards."""
    return [_read(shard, rebuild, cache) for shard in shards]


def _read(shard: str, rebuild: bool, cache: ShardCache) -> _Indexed:
    try:
        one = read_index(shard, rebuild=rebuild, cache=cache)
    except UserError as error:  # a remote shard that is missing or denied
        return _Indexed(damage=str(error))
    except OutageError as error:
        return _Indexed(lost=str(error))
    except OSError as error:
        return _Indexed(damage=f"shard {shard!r} cannot be read: {error.strerror or error}")
    return _Indexed(one.num_samples, len(one.offsets), one.damage, one.remark)
