"""Exponential moving average of the weights, by Lightning's ``EMAWeightAveraging``.

The last checkpoint of a run holds the weights under training too, not only their average.
"""

import warnings

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from dist_siglip.errors import UserError


class WeightAverage(EMAWeightAveraging):
    """average = decay * average + (1 - decay) * weights, after every optimizer step.

    Evaluations, checkpoints ("state_dict") and exports use the average; training goes on from the
    weights, which a checkpoint keeps as "current_model_state".

    Args:
        decay: in (0, 1); about the last 1 / (1 - decay) steps count.
        start_step: first optimizer step that counts; until then the average is the start.
        every_steps: optimizer steps between two updates.

    Raises:
        UserError: if a number is out of range; later, if the model is sharded.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0, every_steps: int = 1) -> None:
        if not 0 < decay < 1:
            raise UserError(f"WeightAverage.decay ({decay}) must be in (0, 1), e.g. 0.999")
        for name, value, least in (("start_step", start_step, 0), ("every_steps", every_steps, 1)):
            if value < least:
                raise UserError(f"WeightAverage.{name} ({value}) must be at least {least}")
        super().__init__(
            decay=decay,
            update_every_n_steps=every_steps,
            update_starting_at_step=start_step or None,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the model; a sharded one cannot be copied before it is in shards."""
        if pl_module.device_mesh is not None:
            raise UserError(
                "WeightAverage cannot average a sharded model; leave the callback or the strategy "
                "FullyShardedStrategy out"
            )
        with warnings.catch_warnings():
            # Our configure_model does nothing where nothing is sharded.
            warnings.filterwarnings("ignore", message=".*overrides the configure_model")
            super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the weights as they are until the last checkpoint is written."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model its average."""
        super().on_train_end(trainer, pl_module)
