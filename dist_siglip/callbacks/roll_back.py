"""How do weights and moments go back to an earlier checkpoint while the run goes on?

The step, the learning rate and the position in the data stay where they are, so what follows are
other batches than those that led astray.

Source: Chowdhery et al. 2022, arXiv:2204.02311, section 5.1: training restarted from a checkpoint
before a spike of the loss, past the batches around it, did not spike again.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from dist_siglip.distributed import max_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder
from dist_siglip.runs.checkpoints.checksum import damage_of
from dist_siglip.runs.checkpoints.optimizer_names import by_number

logger = logging.getLogger(__name__)


def roll_back(trainer: Trainer, before_step: int) -> int | None:
    """Load weights and state of the optimizer from the newest sound checkpoint before a step.

    Distributed contract: every rank calls it between two steps; the first one chooses.

    Args:
        trainer: in ``fit``, with one optimizer.
        before_step: the checkpoint's step is smaller.

    Returns:
        The step of the checkpoint; None if there is none that can be used, and nothing changed.
    """
    folder = RunFolder(Path(trainer.default_root_dir))
    found = _newest_sound(folder, before_step) if trainer.is_global_zero else None
    step: int | None = trainer.strategy.broadcast(found)
    if step is None:
        return None
    groups = [_settings(group) for each in trainer.optimizers for group in each.param_groups]
    if not _load(trainer, folder.checkpoint(step)):
        return None
    loaded = (group for each in trainer.optimizers for group in each.param_groups)
    for group, now in zip(loaded, groups, strict=True):
        group.update(now)
    return step


def _newest_sound(folder: RunFolder, before_step: int) -> int | None:
    for step in reversed(folder.steps_with_checkpoint()):
        if step < before_step:
            damage = damage_of(folder.checkpoint(step))
            if damage is None:
                return step
            logger.warning("%s is damaged (%s)", folder.checkpoint(step), damage)
    return None


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Learning rate and all else that a group holds besides its parameters."""
    return {name: value for name, value in group.items() if name != "params"}


def _load(trainer: Trainer, path: Path) -> bool:
    """Load the checkpoint on every rank, or, if one cannot read it, on none."""
    checkpoint: dict[str, Any] = {}
    reason = ""
    try:
        # A strategy that shards the model restores it here; the others only read.
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    except (UserError, OSError) as error:
        reason = str(error)
    if "state_dict" in checkpoint and not checkpoint.get("optimizer_states"):
        reason = f"{path} holds no state of an optimizer"
    if reason:
        logger.warning("cannot go back: %s", reason)
    failed = torch.tensor(float(bool(reason)), device=trainer.strategy.root_device)
    if max_over_ranks(failed).item():
        return False
    if "state_dict" in checkpoint:
        trainer.strategy.load_model_state_dict(checkpoint)
        states = [by_number(state) for state in checkpoint["optimizer_states"]]
        trainer.strategy.load_optimizer_state_dict({"optimizer_states": states})
    return True
