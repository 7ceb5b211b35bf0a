"""``bench checkpoint``: what a checkpoint costs training, written at once or in the background.

A stand-in for training, matrix products in a row, goes on for three times as long as a write takes:
without a checkpoint, with one that it waits for, and with one that is copied and written by a
thread. What it is longer for a checkpoint is the cost.
"""

import json as json_text
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from dist_siglip.errors import UserError
from dist_siglip.runs.checkpoints.io import BackgroundWrite, Snapshot
from dist_siglip.runs.checkpoints.selection import damage_of
from dist_siglip.training.callbacks import AtomicCheckpointIO


class CheckpointCost(NamedTuple):
    """Seconds of a checkpoint, medians over rounds.

    Attributes:
        size_bytes: of the file.
        write_seconds: written and synced, nothing beside it.
        check_seconds: compared with its checksum, as at every start; the file is in memory.
        added_seconds: by which training is longer if it waits.
        added_in_background_seconds: if a thread writes.
        copy_seconds: the part of that which training stands still for.
    """

    size_bytes: int
    write_seconds: float
    check_seconds: float
    added_seconds: float
    added_in_background_seconds: float
    copy_seconds: float


def checkpoint(
    folder: str = ".",
    million_parameters: float = 100.0,
    rounds: int = 3,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Measure what a checkpoint costs training, where it would be written.

    Args:
        folder: an existing folder on the file system of the runs; left as it was.
        million_parameters: of a model trained with Adam; float32, with two moments each.
        rounds: medians are taken over these.
        device: cpu, cuda, or auto for cuda where there is one.
        json: print JSON instead of a table.

    Raises:
        UserError: if the folder does not exist or a number is not above 0.
    """
    if not Path(folder).is_dir():
        raise UserError(f"folder ({folder}) does not exist; name one on the file system of runs")
    for name, value in (("million_parameters", million_parameters), ("rounds", rounds)):
        if value <= 0:
            raise UserError(f"{name} ({value}) must be above 0")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    content = _content(million_parameters, device)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        found = _measure(content, Path(place) / "step=00000001.ckpt", rounds, device)
    if json:
        sys.stdout.write(json_text.dumps(found._asdict(), indent=2) + "\n")
        return 0
    Console().print(_table(found, device))
    return 0


def _content(million_parameters: float, device: str) -> dict[str, Any]:
    """Weights and moments in tensors of a million numbers."""
    names = [f"layer.{i}" for i in range(max(1, round(million_parameters)))]
    count = round(million_parameters * 1e6 / len(names))
    weights, first, second = (
        {name: torch.rand(count, device=device) for name in names} for _ in range(3)
    )
    moments = {name: {"exp_avg": first[name], "exp_avg_sq": second[name]} for name in names}
    return {"state_dict": weights, "optimizer_states": [{"state": moments, "param_groups": []}]}


def _measure(content: dict[str, Any], path: Path, rounds: int, device: str) -> CheckpointCost:
    matrix = torch.rand(512, 512, device=device)
    times: dict[str, list[float]] = defaultdict(list)

    def take(name: str, work: Callable[[], object]) -> float:
        started = time.monotonic()
        work()
        times[name].append(time.monotonic() - started)
        return times[name][-1]

    def write(what: dict[str, Any]) -> None:
        AtomicCheckpointIO().save_checkpoint(what, path)

    def train(num_products: int) -> None:
        result = matrix
        for _ in range(num_products):
            result = (result @ matrix) / 512
        float(result[0, 0])  # on a GPU: wait for it

    def write_and_train(num_products: int) -> None:
        write(content)
        train(num_products)

    def train_beside_a_write(num_products: int) -> None:
        background = BackgroundWrite()
        copied: list[dict[str, Any]] = []
        take("copy", lambda: copied.append(Snapshot(content).read()))
        background.start(1, lambda: write(copied[0]))
        train(num_products)
        background.finish()

    train(20)
    for _ in range(rounds):
        written = take("write", lambda: write(content))
        take("check", lambda: damage_of(path))
        number = max(1, round(3 * written * 50 / take("products", lambda: train(50))))
        take("training", partial(train, number))
        times["added"].append(take("waiting", partial(write_and_train, number)))
        times["added"][-1] -= times["training"][-1]
        times["beside"].append(take("both", partial(train_beside_a_write, number)))
        times["beside"][-1] -= times["training"][-1]
    return CheckpointCost(
        size_bytes=path.stat().st_size,
        write_seconds=median(times["write"]),
        check_seconds=median(times["check"]),
        added_seconds=median(times["added"]),
        added_in_background_seconds=median(times["beside"]),
        copy_seconds=median(times["copy"]),
    )


def _table(found: CheckpointCost, device: str) -> Table:
    table = Table(title=f"a checkpoint of {found.size_bytes / 2**20:,.0f} MiB, {device}")
    for heading in (
        "write and sync", "check", "training waits", "written in the background", "copy of it",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    table.add_row(
        f"{found.write_seconds:.2f} s",
        f"{found.check_seconds:.2f} s",
        f"+{found.added_seconds:.2f} s",
        f"+{found.added_in_background_seconds:.2f} s",
        f"{found.copy_seconds:.2f} s",
    )
    return table
