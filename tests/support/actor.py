"""A stand-in for ``python`` in a batch script: writes down how it was called, then plays a part.

Starting the real thing takes seconds of every rank; what the batch scripts make of exit codes and
signals can be seen without it. ``ACTOR_PART`` is "wait" (leave with 75 when asked to stop, as
``fit`` does) or the exit code to leave with; ``ACTOR_NOTES`` a folder for the notes.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

_asked: list[str] = []


def act() -> int:
    """Play the part; return the exit code."""
    for name in ("SIGUSR1", "SIGUSR2", "SIGTERM"):
        signal.signal(getattr(signal, name), lambda number, _: _asked.append(number))
    notes = Path(os.environ["ACTOR_NOTES"])
    rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    kept = ("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "CONTAINER")
    note = {"arguments": sys.argv[1:], **{name: os.environ.get(name) for name in kept}}
    job = os.environ["SLURM_JOB_ID"]
    name = f"{job}-{rank}-{restart}.json"
    (notes / f"{name}.tmp").write_text(json.dumps(note))
    os.rename(notes / f"{name}.tmp", notes / name)
    if os.environ["ACTOR_PART"] != "wait":
        # All are there before one leaves: a launcher ends the others, which must hear it by then.
        ranks = int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_NTASKS"])
        while len(list(notes.glob(f"{job}-*-{restart}.json"))) < ranks:
            time.sleep(0.05)
        return int(os.environ["ACTOR_PART"])
    while not _asked:
        time.sleep(0.05)
    time.sleep(float(rank) / 2)  # the others leave while the step is already being ended
    return 75


if __name__ == "__main__":
    sys.exit(act())
