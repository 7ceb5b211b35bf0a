"""How does the data module hear of every trained batch, before anything else does?

A small callback, first in line, so that every checkpoint sees its count.
"""

from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from dist_siglip.errors import UserError


class Counting(Protocol):
    """What counts trained batches."""

    def advance(self) -> None:
        """Count one trained global batch."""

    def epochs(self) -> dict[str, float]:
        """Say how many epochs are done, by the name of the metric."""


class PositionCounter(Callback):
    """Tell the data module about every trained batch."""

    def __init__(self, datamodule: Counting) -> None:
        self.datamodule = datamodule

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the batch; log now and then how many epochs are done."""
        self.datamodule.advance()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning
        if every and trainer.global_step % every == 0:
            pl_module.log_dict(self.datamodule.epochs())


def count_first(trainer: Trainer, datamodule: Counting) -> None:
    """Put the counter before all callbacks, so that a checkpoint of this step has its count."""
    callbacks = _callbacks(trainer)
    others = [callback for callback in callbacks if not isinstance(callback, PositionCounter)]
    callbacks[:] = [PositionCounter(datamodule), *others]


def refuse_accumulation(trainer: Trainer) -> None:
    """Refuse settings under which a step is not one global batch.

    Raises:
        UserError: if the trainer accumulates gradients.
    """
    scheduled = any(isinstance(c, GradientAccumulationScheduler) for c in _callbacks(trainer))
    if trainer.accumulate_grad_batches != 1 or scheduled:
        value = "scheduled" if scheduled else trainer.accumulate_grad_batches
        raise UserError(
            f"accumulate_grad_batches ({value}) must be 1: accumulation changes a contrastive "
            "loss, whose negatives come from one batch; raise global_batch_size instead, and set "
            "model.micro_batch_size if its activations do not fit the memory"
        )


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it
    return callbacks
