"""Exponential moving average of the weights, on Lightning's ``WeightAveraging``.

The last checkpoint of a run holds the weights under training too, not only their average.
"""

import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dist_siglip.errors import UserError


class WeightAverage(WeightAveraging):
    """average = decay * average + (1 - decay) * weights, after every optimizer step.

    The average lies on the device of the weights; the host reads nothing of it in a step, as
    Lightning's own update does, and starts one operation for all tensors of a dtype.

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
        super().__init__()
        self.decay = decay
        self.start_step = start_step
        self.every_steps = every_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the step with this number, from 0, counts; the end of an epoch never does."""
        if step_idx is None:
            return False
        return step_idx >= self.start_step and step_idx % self.every_steps == 0

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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Update the average if a step was taken that counts."""
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            # The first weights that count replace the start.
            weight = 1 - self.decay if self._latest_update_step else 1.0
            move_towards(self._average.module, pl_module, weight)
            self._average.n_averaged += 1
            self._latest_update_step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the weights as they are until the last checkpoint is written."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model its average."""
        super().on_train_end(trainer, pl_module)

    @property
    def _average(self) -> AveragedModel:
        assert self._average_model is not None  # setup has made it
        return self._average_model


@torch.no_grad()
def move_towards(average: nn.Module, module: nn.Module, weight: float) -> None:
    """Set average += weight * (module - average), in place, for parameters and stored buffers.

    One operation for all tensors of a dtype. Tensors of whole numbers are copied.

    Args:
        average: with the tensors of ``module``, on the same device; dtypes may differ.
        module: as it is now.
        weight: in (0, 1]; 1 copies.

    Example:
        >>> average, module = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> for each, value in ((average, 1.0), (module, 2.0)):
        ...     for parameter in each.parameters():
        ...         _ = torch.nn.init.constant_(parameter, value)
        >>> move_towards(average, module, 0.25)
        >>> average.weight.item(), average.bias.item()
        (1.25, 1.25)
    """
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for old, new in zip(_tensors(average), _tensors(module), strict=True):
        if old is new:
            continue  # of a teacher, which is an average already and which both share
        ours, theirs = groups[old.dtype]
        ours.append(old)
        theirs.append(new.to(old.dtype))
    for dtype, (ours, theirs) in groups.items():
        if weight < 1 and dtype.is_floating_point:
            torch._foreach_lerp_(ours, theirs, weight)
        else:
            torch._foreach_copy_(ours, theirs)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, and buffers that are state; a mask of -inf is none, and has no mean."""
    stored = module.state_dict(keep_vars=True)
    buffers = (each for name, each in module.named_buffers() if name in stored)
    return itertools.chain(module.parameters(), buffers)
