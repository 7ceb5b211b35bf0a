"""Which checkpoint of a run is whole, and what is wrong with the newer ones?

A checkpoint gets its name when it is complete, but a disk can still lose or change what it was
given. So before a run goes on, or anything is made of it, the bytes are compared with their
checksum, and a checkpoint that was hurt is passed over for the one before it.
"""

import logging
from pathlib import Path

from dist_siglip.errors import UserError
from dist_siglip.runs.checkpoints.checksum import damage_of, has_checksum
from dist_siglip.runs.folder import RunFolder

logger = logging.getLogger(__name__)


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
            return path
        logger.warning("checkpoint %s is damaged (%s); looking for an older one", path, damage)
    if steps:
        raise UserError(
            f"run_dir ({folder.path}) has {len(steps)} checkpoints and all are damaged; restore "
            f"one from a copy, or remove {folder.checkpoints} to begin anew"
        )
    return None


def check_sound(path: Path) -> None:
    """Refuse a checkpoint whose bytes are not those that were written.

    A file of another program carries no checksum; whether it can be read decides.

    Raises:
        UserError: naming the damage.
    """
    damage = damage_of(path) if path.is_dir() or has_checksum(path) else None
    if damage is not None:
        raise UserError(
            f"checkpoint ({path}) cannot be read ({damage}); it is damaged; use another one"
        )
