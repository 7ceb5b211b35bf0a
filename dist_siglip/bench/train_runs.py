"""Training runs for ``bench train``, ours and open_clip's: how they are started and timed.

Both are what a user would start: ``dist-siglip fit`` with its run folder, logs and callbacks, and
``open_clip_train`` under torchrun. Same architecture, shards, batch, precision, loader processes,
threads, clipping and interval of logging. Time counts from a step after the warm-up to the last
one, on the clock of the first rank: ours from within, open_clip's by the arrival of its log lines.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_siglip.bench import train_peer
from dist_siglip.errors import UserError

Precision = Literal["32-true", "bf16-mixed"]
LOG_EVERY = 10
_PEER_PRECISION = {"32-true": "fp32", "bf16-mixed": "amp_bf16"}
_PEER_LINE = re.compile(r"Train Epoch: \d+ \[ *(\d+)/.*Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)")
_COMPLAINT = re.compile(r"[Ee]rror: \S")
_CLOCK = "dist_siglip.bench.train_clock.StepClock"


@dataclass(frozen=True, kw_only=True)
class TrainCase:
    """What both are given.

    Args:
        world_size: processes.
        model: built-in open_clip name or path of a JSON config.
        shards: local webdataset shards with .jpg and .txt.
        local_batch_size: pairs of a process.
        workers: loader processes of each process.
        threads: of each process.
        precision: as Lightning names it.
        device: "cpu" or "cuda".
        compile_towers: translate the model with torch.compile.
        warmup_steps: that do not count; a multiple of ``LOG_EVERY``.
        steps: that count; a multiple of ``LOG_EVERY``.
    """

    world_size: int
    model: str
    shards: tuple[str, ...]
    local_batch_size: int
    workers: int
    threads: int
    precision: Precision
    device: str
    compile_towers: bool
    warmup_steps: int
    steps: int

    @property
    def global_batch_size(self) -> int:
        """Pairs of all processes."""
        return self.world_size * self.local_batch_size


@dataclass(frozen=True, kw_only=True)
class TrainSpeed:
    """What was found.

    Args:
        samples_per_second: pairs of all processes per second.
        shares: of the time, by phase; open_clip's log tells of data alone.
        peak_bytes: of the first rank: its process on a CPU, its tensors on a GPU.
        gemm_flops_per_second: of one rank; None for open_clip.
        processor_seconds: of the processors for a step of the first rank; None for open_clip.
    """

    samples_per_second: float
    shares: Mapping[str, float]
    peak_bytes: int
    gemm_flops_per_second: float | None = None
    processor_seconds: float | None = None


def run_ours(
    case: TrainCase, folder: Path, more: Mapping[str, Mapping[str, Any]] | None = None
) -> TrainSpeed:
    """Run ``dist-siglip fit`` in an empty folder.

    Args:
        case: what to train.
        folder: for the run.
        more: settings beyond those of the case, by group.

    Raises:
        UserError: if it fails; with its complaint.
    """
    found = folder / "clock.json"
    clock = {"path": str(found), "first_step": case.warmup_steps}
    settings: dict[str, Any] = {
        "seed_everything": 0,
        "run_dir": str(folder / "run"),
        "model": {"model": case.model, "compile_towers": case.compile_towers},
        "data": {
            "train_shards": list(case.shards),
            "global_batch_size": case.global_batch_size,
            "workers_per_rank": case.workers,
        },
        "trainer": {
            "accelerator": "cpu" if case.device == "cpu" else "gpu",
            "devices": case.world_size,
            "precision": case.precision,
            "max_steps": case.warmup_steps + case.steps,
            "log_every_n_steps": LOG_EVERY,
            "callbacks": [{"class_path": _CLOCK, "init_args": clock}],
        },
    }
    for group, values in (more or {}).items():
        settings[group] = {**settings[group], **values}
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    run_command(
        [sys.executable, "-m", "dist_siglip", "fit", "--config", str(config)], case, "dist-siglip"
    )
    measured: dict[str, Any] = json.loads(found.read_text())
    seconds = sum(measured["seconds"].values())
    return TrainSpeed(
        samples_per_second=measured["steps"] * case.global_batch_size / seconds,
        shares={phase: part / seconds for phase, part in measured["seconds"].items()},
        peak_bytes=measured["peak_bytes"],
        gemm_flops_per_second=measured["gemm_flops_per_second"],
        processor_seconds=measured["processor_seconds"] / measured["steps"],
    )


def run_open_clip(case: TrainCase, folder: Path, python: str) -> TrainSpeed:
    """Run ``open_clip_train`` in an empty folder.

    Args:
        case: what to train.
        folder: for its logs.
        python: interpreter of the virtual environment that has it.

    Raises:
        UserError: if it fails; with its complaint.
    """
    is_json = case.model.endswith(".json")
    samples = (case.warmup_steps + case.steps) * case.global_batch_size
    options = {
        "model": Path(case.model).stem if is_json else case.model,
        "dataset-type": "webdataset",
        "train-data": "::".join(case.shards),
        "train-num-samples": samples,
        "batch-size": case.local_batch_size,
        "workers": case.workers,
        "precision": _PEER_PRECISION[case.precision],
        "device": case.device,
        "epochs": 1,
        "lr": 1e-3,
        "warmup": 10,
        "grad-clip-norm": 1.0,
        "log-every-n-steps": LOG_EVERY,
        "logs": folder,
        "name": "run",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    arguments += ["--siglip", "--dataset-resampled"]
    if case.compile_towers:
        arguments.append("--torchcompile")
    given = {"model_config": case.model if is_json else None, "arguments": arguments}
    settings = folder / "arguments.json"
    settings.write_text(json.dumps(given))
    script = str(shutil.copy(train_peer.__file__, folder))
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={case.world_size}",
    ]
    command = [python, *(launcher if case.world_size > 1 else []), script, str(settings)]
    lines = run_command(command, case, "open_clip_train")
    return _read_peer(lines, case.warmup_steps * case.global_batch_size)


def _read_peer(lines: Sequence[tuple[float, str]], first_samples: int) -> TrainSpeed:
    """Read what its log says from the first line with ``first_samples`` samples done or more."""
    found = [(moment, _PEER_LINE.search(line)) for moment, line in lines]
    counted = [
        (moment, int(match[1]), float(match[2]), float(match[3]))
        for moment, match in found
        if match is not None and int(match[1]) >= first_samples
    ]
    peaks = [line for _, line in lines if line.startswith(train_peer.PEAK)]
    if len(counted) < 2 or not peaks:
        raise UserError(
            "open_clip_train wrote no log as version 3.3 does; install "
            "open_clip_torch[training]==3.3.* for open_clip_python"
        )
    (start, first, *_), (end, last, *_) = counted[0], counted[-1]
    waits, batches = (sum(line[column] for line in counted[1:]) for column in (2, 3))
    return TrainSpeed(
        samples_per_second=(last - first) / (end - start),
        shares={"data": waits / batches},
        peak_bytes=int(peaks[-1].removeprefix(train_peer.PEAK)),
    )


def run_command(command: Sequence[str], case: TrainCase, name: str) -> list[tuple[float, str]]:
    """Run a command to its end and return its lines, each with the moment it came.

    Raises:
        UserError: if it fails; with its complaint.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(case.threads),
        "PYTHONUNBUFFERED": "1",
    }
    lines = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append((time.perf_counter(), line.rstrip()))  # noqa: PERF401 - the moment
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        said = [line for _, line in lines if line.strip()] or ["it said nothing"]
        complaints = [line for line in said if _COMPLAINT.search(line)]  # torchrun adds a page
        reason = (complaints or said)[-1]
        raise UserError(f"{name} ended with code {process.returncode}: {reason}")
    return lines
