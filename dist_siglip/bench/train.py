"""``bench train``: samples/s of whole training runs, where their time goes, and open_clip's beside.

Ours and open_clip's take turns within every round, so that a busy machine is busy for both; what is
reported is the median round. Each is a run of its own, started as a user would start it.
"""

import json as json_text
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from dist_siglip.bench.data import PICTURE_SIZES, write_photo_shards
from dist_siglip.bench.plan import mebibytes
from dist_siglip.bench.train_clock import PHASES, step_flops
from dist_siglip.bench.train_objectives import (
    RECORD,
    choose_variants,
    measure_objectives,
    print_objectives,
)
from dist_siglip.bench.train_runs import (
    LOG_EVERY,
    Precision,
    TrainCase,
    TrainSpeed,
    run_open_clip,
    run_ours,
)
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder

logger = logging.getLogger(__name__)

OURS, OPEN_CLIP = "ours", "open_clip_train"

# A vision and a text transformer of 0.8 M parameters each, beside the token embedding.
_TINY: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 96,
        "patch_size": 16,
        "layers": 4,
        "width": 128,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 49408,
        "layers": 4,
        "width": 128,
        "heads": 4,
    },
}


def train(
    model: str | None = None,
    shards: str | list[str] | None = None,
    world_sizes: Sequence[int] = (1,),
    local_batch_size: int = 64,
    precision: Precision = "32-true",
    workers_per_rank: int = 1,
    threads: int | None = None,
    warmup_steps: int = 10,
    steps: int = 40,
    rounds: int = 3,
    pictures: int = 2048,
    compile_towers: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    open_clip_python: str | None = None,
    objectives: str | list[str] | None = None,
    count_only: bool = False,
    json: bool = False,
) -> int:
    """Time whole training runs of ``fit``, and of open_clip_train beside them.

    Model FLOPs utilisation is the arithmetic of towers and loss, without recomputation, over that
    of the fastest plain matrix product in the same precision, measured in the same processes.

    Args:
        model: open_clip architecture, a built-in name or a JSON config. Null is a tiny pair of
            transformers.
        shards: local webdataset shards with .jpg and .txt, at least one for each loader process.
            Null writes some with photo-like JPEGs of 256 x 320 pixels.
        world_sizes: numbers of processes.
        local_batch_size: pairs of a process.
        precision: of both.
        workers_per_rank: loader processes of each process.
        threads: of each process. Null shares out the cores.
        warmup_steps: first steps, which do not count; a multiple of 10.
        steps: that count; a multiple of 10.
        rounds: how often each is run; the median counts.
        pictures: that are written.
        compile_towers: translate the model of both with torch.compile.
        device: cpu, cuda (one process per GPU), or auto for cuda where there is one.
        open_clip_python: Python of a virtual environment with open_clip_torch[training]==3.3.*,
            which needs a webdataset of its own. Null times ours alone.
        objectives: measure what each costs a step beside the sigmoid loss alone, and count its
            operations: names, "all", or a configuration with model.objectives or model.loss.
        count_only: count the operations of objectives and start no run.
        json: print JSON instead of a table.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if objectives is not None and open_clip_python is not None:
        raise UserError("objectives and open_clip_python exclude each other; leave one of them out")
    if count_only and objectives is None:
        raise UserError("count_only (true) counts objectives; name them, like --objectives=all")
    _check(world_sizes, local_batch_size, workers_per_rank, warmup_steps, steps, rounds, threads)
    if device == "cuda" and max(world_sizes) > torch.cuda.device_count():
        raise UserError(
            f"world_sizes ({max(world_sizes)}) must be at most the {torch.cuda.device_count()} "
            "GPUs of this machine; or set device to cpu"
        )
    if open_clip_python is not None and shutil.which(open_clip_python) is None:
        raise UserError(
            f"open_clip_python ({open_clip_python}) must be a program; python -m venv FOLDER makes "
            "FOLDER/bin/python"
        )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None:
            model = str(folder / "tiny.json")
            Path(model).write_text(json_text.dumps(_TINY))
        num_loaders = max(world_sizes) * workers_per_rank
        if count_only:
            paths = [""] * num_loaders
        elif shards is None:
            paths = write_photo_shards(
                folder / "shards",
                PICTURE_SIZES[0],
                pictures,
                max(8, num_loaders),
                record=None if objectives is None else RECORD,
            )
        else:
            paths = expand_shards(shards, allow_remote=False)
        if len(paths) < num_loaders:
            raise UserError(
                f"shards ({len(paths)}) must be at least one for each of {num_loaders} loader "
                "processes"
            )
        for world_size in world_sizes:
            case = TrainCase(
                world_size=world_size,
                model=model,
                shards=tuple(str(Path(path).resolve()) for path in paths),
                local_batch_size=local_batch_size,
                workers=workers_per_rank,
                threads=threads or max(1, len(os.sched_getaffinity(0)) // world_size),
                precision=precision,
                device=device,
                compile_towers=compile_towers,
                warmup_steps=warmup_steps,
                steps=steps,
            )
            place = folder / f"world-{world_size}"
            if objectives is None:
                rows += _measure(case, rounds, open_clip_python, place)
            else:
                asked = [objectives] if isinstance(objectives, str) else objectives
                turns = 0 if count_only else rounds
                variants = choose_variants(
                    asked, case, folder, has_records=shards is None, writes=not count_only
                )
                rows += measure_objectives(case, turns, variants, place)
    if json:
        sys.stdout.write(json_text.dumps(rows, indent=2) + "\n")
    elif objectives is None:
        Console().print(_table(rows, rounds, steps, device, precision))
    else:
        print_objectives(rows, f"cost of objectives on {device}, {precision}, {rounds} rounds")
    return 0


def _check(
    world_sizes: Sequence[int],
    local_batch_size: int,
    workers_per_rank: int,
    warmup_steps: int,
    steps: int,
    rounds: int,
    threads: int | None,
) -> None:
    for name, value in (
        *(("world_sizes", size) for size in world_sizes),
        ("local_batch_size", local_batch_size),
        ("workers_per_rank", workers_per_rank),
        ("rounds", rounds),
        ("threads", 1 if threads is None else threads),
    ):
        if value < 1:
            raise UserError(f"{name} ({value}) must be at least 1")
    for name, value in (("warmup_steps", warmup_steps), ("steps", steps)):
        if value < LOG_EVERY or value % LOG_EVERY:
            raise UserError(
                f"{name} ({value}) must be a multiple of {LOG_EVERY}, at which both write a log"
            )


def _measure(
    case: TrainCase, rounds: int, open_clip_python: str | None, folder: Path
) -> list[dict[str, Any]]:
    """Run one case ``rounds`` times; return a row for each side."""
    built = build_dual_encoder(case.model)
    flops = step_flops(
        built, local_batch_size=case.local_batch_size, global_batch_size=case.global_batch_size
    )
    names = (OURS,) if open_clip_python is None else (OPEN_CLIP, OURS)
    found: dict[str, list[TrainSpeed]] = {name: [] for name in names}
    for number in range(rounds):
        for name, speeds in found.items():
            place = folder / f"{number}-{name}"
            place.mkdir(parents=True)
            if open_clip_python is not None and name == OPEN_CLIP:
                speeds.append(run_open_clip(case, place, open_clip_python))
            else:
                speeds.append(run_ours(case, place))
            logger.info(
                "W=%d, round %d of %d, %s: %.0f samples/s",
                case.world_size,
                number + 1,
                rounds,
                name,
                speeds[-1].samples_per_second,
            )
    limit = max(speed.gemm_flops_per_second or 0.0 for speed in found[OURS])
    rates = {name: [s.samples_per_second for s in speeds] for name, speeds in found.items()}
    return [
        {
            "world_size": case.world_size,
            "threads": case.threads,
            "local_batch_size": case.local_batch_size,
            "contestant": name,
            "samples_per_second": median(rates[name]),
            "least": min(rates[name]),
            "most": max(rates[name]),
            "ratio": median(rates[name]) / median(rates[OPEN_CLIP]) if OPEN_CLIP in rates else None,
            "mfu": flops * median(rates[name]) / case.global_batch_size / limit,
            "gemm_flops_per_second": limit,
            "step_flops": flops,
            "shares": _median_shares(speeds),
            "peak_bytes": median(speed.peak_bytes for speed in speeds),
        }
        for name, speeds in found.items()
    ]


def _median_shares(speeds: Sequence[TrainSpeed]) -> dict[str, float]:
    return {phase: median(s.shares[phase] for s in speeds) for phase in speeds[0].shares}


class _Column(NamedTuple):
    heading: str
    key: str
    form: str


_COLUMNS = (
    _Column("W", "world_size", "d"),
    _Column("threads", "threads", "d"),
    _Column("b", "local_batch_size", "d"),
    _Column("run", "contestant", "s"),
    _Column("samples/s", "samples_per_second", ",.0f"),
    _Column("least", "least", ",.0f"),
    _Column("most", "most", ",.0f"),
    _Column("ratio", "ratio", ".2f"),
    _Column("MFU", "mfu", ".1%"),
)


def _table(
    rows: list[dict[str, Any]], rounds: int, steps: int, device: str, precision: str
) -> Table:
    table = Table(
        title=f"whole training runs on {device}, {precision}",
        caption=(
            f"medians of {rounds} interleaved runs of {steps} steps after the warm-up; W processes "
            "of b pairs and so many threads; ratio: samples/s over open_clip_train's; MFU: model "
            "FLOPs over those of the fastest matrix product, "
            f"{max(row['gemm_flops_per_second'] for row in rows) / 1e9:,.0f} GFLOP/s a process; "
            "then shares of the time of the first rank; towers include the exchange of their "
            "gradients, rest is logging, callbacks and Lightning"
        ),
    )
    for column in _COLUMNS:
        table.add_column(column.heading, justify="left" if column.key == "contestant" else "right")
    for heading in (*PHASES, "peak"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = ["" if row[key] is None else format(row[key], form) for _, key, form in _COLUMNS]
        shares = row["shares"]
        cells += [f"{shares[phase]:.1%}" if phase in shares else "" for phase in PHASES]
        table.add_row(*cells, mebibytes(row["peak_bytes"]))
    return table
