"""Selection of a checkpoint: the newest sound one, and the best one.

A checkpoint gets its name when it is complete, but a disk can still lose or change bytes. So they
are compared with their checksum before use, and a corrupt checkpoint is passed over for the one
before it.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dist_siglip.errors import UserError
from dist_siglip.runs.checkpoints.checksum import damage_of, has_checksum
from dist_siglip.runs.folder import RunFolder
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import read_json

logger = logging.getLogger(__name__)

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class BestCheckpoint:
    """Step, metric and value of the best checkpoint, as ``checkpoints/best.json`` has them."""

    step: int
    metric: str
    value: float

    def is_beaten_by(self, value: float, mode: Mode) -> bool:
        """Whether another value is better; one that is no number never is.

        Example:
            >>> best = BestCheckpoint(500, "val/loss", 0.4)
            >>> [best.is_beaten_by(value, "min") for value in (0.3, 0.4, float("nan"))]
            [True, False, False]
        """
        return value < self.value if mode == "min" else value > self.value

    def write(self, folder: RunFolder) -> None:
        """Write it down in one piece."""
        write_atomically(folder.best, json.dumps(asdict(self)) + "\n")


def read_best(folder: RunFolder, metric: str, mode: Mode) -> BestCheckpoint:
    """Return what is written down, or what anything beats if it is of no use.

    It is of use if it is about this metric and its checkpoint is there.
    """
    nothing = BestCheckpoint(-1, metric, math.inf if mode == "min" else -math.inf)
    try:
        found = BestCheckpoint(**read_json(folder.best))
        is_of_use = found.metric == metric and found.step in folder.steps_with_checkpoint()
        is_of_use = is_of_use and math.isfinite(found.value)
    except (OSError, ValueError, TypeError, OverflowError):
        return nothing
    return found if is_of_use else nothing


# Checkpoints that were verified for this start: path -> inode, size and time of change.
_verified: dict[Path, tuple[int, int, int]] = {}


def newest_sound_checkpoint(folder: RunFolder) -> Path | None:
    """Return the checkpoint of the largest step whose bytes are those that were written.

    Every newer one is named in the log, with what is wrong with it. Each byte of the newest is
    read once, about a second per GB or less.

    Returns:
        None if the run has no checkpoint at all.

    Raises:
        UserError: if it has some and all are damaged: a run must not begin anew by itself.
    """
    steps = folder.steps_with_checkpoint()
    for step in reversed(steps):
        path = folder.checkpoint(step)
        damage = damage_of(path)
        if damage is None:
            if path.is_file() and not has_checksum(path):
                logger.warning("checkpoint %s has no checksum; only its end was looked at", path)
            note_sound(path)
            return path
        logger.warning("checkpoint %s is damaged (%s); looking for an older one", path, damage)
    if steps:
        raise UserError(
            f"run_dir ({folder.path}) has {len(steps)} checkpoints and all are damaged; restore "
            f"one from a copy, or remove {folder.checkpoints} to begin anew"
        )
    return None


def note_sound(path: Path) -> None:
    """Have ``check_sound`` pass a checkpoint that was verified here, or by a rank of this node.

    Nothing is noted of one that is not there: who reads it says so.
    """
    if path.exists():
        _verified[path.absolute()] = _identity(path)


def _identity(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def check_sound(path: Path) -> None:
    """Refuse a checkpoint whose bytes are not those that were written.

    A file of another program carries no checksum; whether it can be read decides. One that was
    verified for this start, and has not been replaced since, is not read again.

    Raises:
        UserError: naming the damage.
    """
    if _verified.get(path.absolute(), ()) == (_identity(path) if path.exists() else None):
        return
    damage = damage_of(path) if path.is_dir() or has_checksum(path) else None
    if damage is not None:
        raise UserError(
            f"checkpoint ({path}) cannot be read ({damage}); it is damaged; use another one"
        )
