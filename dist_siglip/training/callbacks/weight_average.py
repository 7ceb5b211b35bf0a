"""Exponential moving average of the weights, on Lightning's ``WeightAveraging``.

The last checkpoint of a run holds the weights under training too, not only their average.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

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
        self._pairs: PairedTensors | None = None

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
        self._pairs = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Update the average if a step was taken that counts."""
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            # The first weights that count replace the start.
            weight = 1 - self.decay if self._latest_update_step else 1.0
            if self._pairs is None:
                self._pairs = PairedTensors(self._average.module, pl_module)
            move_towards(self._pairs, weight)
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


class PairedTensors:
    """Parameters and stored buffers of an average and of the module it is of, as pairs.

    Which there are is found once, and again when a module has got, lost or changed a part; the
    tensors are looked up each time, since a buffer may be another one after a step.

    Args:
        average: with the tensors of ``module``, on the same device; dtypes may differ.
        module: what it is an average of.
    """

    def __init__(self, average: nn.Module, module: nn.Module) -> None:
        self._average, self._module = average, module
        self._find()

    def _find(self) -> None:
        """Find what is state; a mask of -inf is none, and has no mean."""
        self._modules = [*self._average.modules(), *self._module.modules()]
        self._parts = list(map(_parts_of, self._modules))
        self._places: list[tuple[dict[str, Any], dict[str, Any], str]] = []
        stored = self._module.state_dict(keep_vars=True)
        seen: set[int] = set()  # of tied parameters the first counts
        named = zip(self._average.modules(), self._module.named_modules(), strict=True)
        for ours, (prefix, theirs) in named:
            for old, new in (
                (ours._parameters, theirs._parameters),
                (ours._buffers, theirs._buffers),
            ):
                for key, tensor in new.items():
                    is_stored = f"{prefix}.{key}".removeprefix(".") in stored
                    if tensor is not None and is_stored and id(tensor) not in seen:
                        seen.add(id(tensor))
                        self._places.append((old, new, key))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the pairs, as they are now."""
        if self._parts != list(map(_parts_of, self._modules)):
            self._find()
        return ((old[key], new[key]) for old, new, key in self._places)


def _parts_of(module: nn.Module) -> tuple[int, ...]:
    """What changes when a module gets, loses or changes a part; of buffers their values may."""
    parts = (*module._modules.values(), *module._parameters.values())
    return (*map(id, parts), *(value is None for value in module._buffers.values()))


@torch.no_grad()
def move_towards(pairs: Iterable[tuple[Tensor, Tensor]], weight: float) -> None:
    """Set average += weight * (current - average), in place.

    One operation for all tensors of a dtype. Tensors of whole numbers are copied.

    Args:
        pairs: (average, current), such as ``PairedTensors``.
        weight: in (0, 1]; 1 copies.

    Example:
        >>> average, module = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> for each, value in ((average, 1.0), (module, 2.0)):
        ...     for parameter in each.parameters():
        ...         _ = torch.nn.init.constant_(parameter, value)
        >>> move_towards(PairedTensors(average, module), 0.25)
        >>> average.weight.item(), average.bias.item()
        (1.25, 1.25)
    """
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for old, new in pairs:
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
