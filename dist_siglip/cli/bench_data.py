"""``bench data``: our loader beside the webdataset pipeline of open_clip, on the same shards.

Contestants take turns within every round, so that a busy machine is busy for all of them; what is
reported is the median round. All end with the same: float32 pictures, normalised, and token rows,
in the process that would train. Ours normalise there, which is counted, in one thread: more would
take the cores of the loader processes.
"""

import json as json_text
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dist_siglip.cli.bench_data_contestants import CONTESTANTS, OPEN_CLIP, Streaming, batches
from dist_siglip.cli.bench_data_shards import PICTURE_SIZES, write_photo_shards
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError


def data(
    shards: str | list[str] | None = None,
    image_size: int = 224,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    local_batch_size: int = 32,
    workers: Sequence[int] = (1, 2),
    rounds: int = 3,
    seconds: float = 2.0,
    pictures: int = 384,
    json: bool = False,
) -> int:
    """Count images/s of our training loader beside those of open_clip's pipeline.

    Args:
        shards: local webdataset shards with .jpg and .txt, at least one for each loader process.
            Null writes some with photo-like JPEGs of 256 x 320, 512 x 640 and 1024 x 1280 pixels.
        image_size: side of the crops, in pixels.
        crop_scale: share of the area that a crop keeps, (least, most).
        local_batch_size: pairs of a batch.
        workers: numbers of loader processes, one thread each.
        rounds: how often each contestant is timed; the median counts.
        seconds: how long each time, after a warm-up.
        pictures: of each size that are written.
        json: print JSON instead of a table.
    """
    for name, value in (
        ("image_size", image_size),
        ("local_batch_size", local_batch_size),
        ("rounds", rounds),
        *(("workers", number) for number in workers),
    ):
        if value < 1:
            raise UserError(f"{name} ({value}) must be at least 1")
    if seconds <= 0:
        raise UserError(f"seconds ({seconds}) must be above 0")
    if pictures < 2 * local_batch_size:
        raise UserError(f"pictures ({pictures}) must be at least two batches")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        for name, paths in _cases(shards, Path(folder), pictures, max(workers)):
            for number in workers:
                streaming = Streaming(
                    shards=tuple(paths),
                    image_size=image_size,
                    crop_scale=crop_scale,
                    local_batch_size=local_batch_size,
                    workers=number,
                )
                rows += _measure(name, streaming, rounds, seconds)
    if json:
        sys.stdout.write(json_text.dumps(rows, indent=2) + "\n")
        return 0
    Console().print(_table(rows, rounds, seconds))
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread of this process inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cases(
    shards: str | list[str] | None, folder: Path, pictures: int, workers: int
) -> Iterator[tuple[str, list[str]]]:
    """Yield the shards to read, by a name for the table."""
    if shards is not None:
        paths = expand_shards(shards, allow_remote=False)
        if len(paths) < workers:
            raise UserError(
                f"shards ({len(paths)}) must be at least one for each of {workers} loader processes"
            )
        yield "yours", paths
        return
    for width, height in PICTURE_SIZES:
        name = f"{width} x {height}"
        yield name, write_photo_shards(folder / name, (width, height), pictures, max(4, workers))


def _measure(name: str, streaming: Streaming, rounds: int, seconds: float) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
    for _ in range(rounds):
        for contestant in CONTESTANTS:
            rates[contestant].append(_images_per_second(contestant, streaming, seconds))
    theirs = median(rates[OPEN_CLIP])
    return [
        {
            "pictures": name,
            "workers": streaming.workers,
            "contestant": contestant,
            "images_per_second": median(found),
            "least": min(found),
            "most": max(found),
            "ratio": median(found) / theirs,
        }
        for contestant, found in rates.items()
    ]


def _images_per_second(contestant: str, streaming: Streaming, seconds: float) -> float:
    """Read batches for a while; what loader processes had ready at the start does not count."""
    stream = batches(contestant, streaming)
    for _ in range(2 + 2 * streaming.workers):
        next(stream)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        images, _ = next(stream)
        count += len(images)
    stream.close()
    return count / elapsed


def _table(rows: list[dict[str, Any]], rounds: int, seconds: float) -> Table:
    table = Table(
        title="images/s of training loaders, one thread per process",
        caption=f"medians of {rounds} interleaved rounds of {seconds:g} s; ratio over open_clip's "
        "pipeline in the same run",
    )
    for heading in ("pictures", "workers", "loader", "images/s", "least", "most", "ratio"):
        table.add_column(heading, justify="left" if heading == "loader" else "right")
    for row in rows:
        table.add_row(
            row["pictures"],
            str(row["workers"]),
            row["contestant"],
            f"{row['images_per_second']:,.0f}",
            f"{row['least']:,.0f}",
            f"{row['most']:,.0f}",
            f"{row['ratio']:.2f}",
        )
    return table
