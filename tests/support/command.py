"""The command line as a user calls it: in a process of its own, on small shards.

``python`` is the interpreter; ``forked_runs.warm_python()`` is one that needs no imports.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from dist_siglip.data.handwriting import write_handwriting_shards
from tests.support.ports import next_port
from tests.support.processes import LIMIT_SECONDS
from tests.support.tiny_models import ARCHITECTURES, write_config

REPOSITORY = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """One thread per process, a port of its own; the repository importable for callbacks."""
    # A rank of its own would be taken for one of a launcher, and wait for the others.
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR")
    return {
        **{name: value for name, value in os.environ.items() if name not in ranks},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "MASTER_PORT": str(next_port()),
        "COLUMNS": "120",
    }


def run_command(
    *arguments: object, timeout_seconds: float = LIMIT_SECONDS, python: object = sys.executable
) -> subprocess.CompletedProcess:
    """Run ``python -m dist_siglip ARGUMENTS`` to its end."""
    return subprocess.run(
        [str(python), "-m", "dist_siglip", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
        timeout=timeout_seconds,
    )


@contextmanager
def started_until(
    arguments: list[object],
    is_time,
    timeout_seconds: float = LIMIT_SECONDS,
    python: object = sys.executable,
):
    """Start the command in a process group, wait for ``is_time()``; end the group at the end."""
    deadline = time.monotonic() + timeout_seconds
    with launched("dist_siglip", *arguments, python=python) as process:
        while not is_time():
            assert process.poll() is None, f"ended by itself with code {process.returncode}"
            assert time.monotonic() < deadline, "the moment to act never came"
            time.sleep(0.02)
        yield process


@contextmanager
def launched(*words: object, python: object = sys.executable, **variables: str):
    """Start ``python -m WORDS`` in a process group, which ends with the block."""
    process = subprocess.Popen(
        [str(python), "-m", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**environment(), **variables},
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill_when(arguments: list[object], is_time, python: object = sys.executable) -> None:
    """SIGKILL the command and all its processes once ``is_time()``."""
    with started_until(arguments, is_time, python=python):
        pass


def is_group_alive(group: int) -> bool:
    """Whether any process of a process group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def write_settings(folder: Path, **trainer: object) -> Path:
    """Write shards of 72 training and 20 validation pairs and a configuration for them."""
    shards = write_handwriting_shards(
        folder / "data", num_train_pairs=72, num_val_pairs=20, num_train_shards=3, image_size=48
    )
    settings = {
        "seed_everything": 3,
        "run_dir": str(folder / "run"),
        "model": {
            "model": write_config(folder / "tiny.json", ARCHITECTURES["clip"]),
            "loss": {
                "class_path": "dist_siglip.losses.SigLipLoss",
                "init_args": {"exchange": "ring"},
            },
            # A large epsilon keeps Adam from blowing rounding differences up to whole steps.
            "optim": {"learning_rate": 0.01, "epsilon": 0.01, "warmup_steps": 2},
        },
        "data": {
            "train_shards": shards.train,
            "val_shards": shards.val,
            "global_batch_size": 12,
            "workers_per_rank": 0,
            "block_shards": 2,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 15,
            "log_every_n_steps": 1,
            "val_check_interval": 10,
            **trainer,
        },
        "checkpoint": {"every_steps": 4},
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
