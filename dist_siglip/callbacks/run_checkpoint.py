"""When checkpoints are written and how many are kept."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder


class RunCheckpoint(Checkpoint):
    """Checkpoints of a run, named by optimizer step, the newest kept.

    A checkpoint holds weights, optimizer, schedule and the position in the data. Older ones are
    removed only after a newer one is complete.

    Args:
        every_steps: optimizer steps between two checkpoints; one more is written at the end.
        keep: number of newest checkpoints kept.

    Raises:
        UserError: if a number is below 1.
    """

    def __init__(self, every_steps: int = 1000, keep: int = 2) -> None:
        for name, value in (("every_steps", every_steps), ("keep", keep)):
            if value < 1:
                raise UserError(f"checkpoint.{name} ({value}) must be at least 1")
        self.every_steps = every_steps
        self.keep = keep

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write when it is time."""
        if trainer.global_step % self.every_steps == 0:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step, unless it just was."""
        if trainer.global_step % self.every_steps:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        """Save on all ranks together, then let rank 0 remove what is no longer kept."""
        folder = RunFolder(Path(trainer.default_root_dir))
        trainer.save_checkpoint(folder.checkpoint(trainer.global_step))
        if trainer.is_global_zero:
            for step in folder.steps_with_checkpoint()[: -self.keep]:
                trainer.strategy.remove_checkpoint(folder.checkpoint(step))
