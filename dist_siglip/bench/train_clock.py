"""Callback that measures the phases of training steps in a run of ``fit``, and their arithmetic.

The time is one line that is cut where one phase ends and the next begins, so that nothing counts
twice and the shares add up to one. On a GPU the cuts are events of its stream, read when the run
is over: nothing waits for the device on their account.

Model FLOPs are those of the matrix products and convolutions, forward and backward, without any
recomputation; the limit is the fastest plain matrix product in the same precision, measured here
and now. Their quotient, the model FLOPs utilisation, needs no data sheet.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_siglip.errors import UserError
from dist_siglip.losses.kernels.tiles import product, uses_onednn
from dist_siglip.models import BuiltModel
from dist_siglip.system.atomic import write_atomically

_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}


def step_flops(built: BuiltModel, *, local_batch_size: int, global_batch_size: int) -> float:
    """Count the model FLOPs of one training step of one rank.

    towers: counted on shapes alone, forward and backward, for two pairs. loss: 3 products of
    (b, D), (N, D) and (b, N) matrices, 6 b N D.

    Args:
        built: the model; its towers are moved to the meta device and hold no weights afterwards.
        local_batch_size: b, pairs of the rank.
        global_batch_size: N, pairs of all ranks.
    """
    size = built.image_size
    height, width = (size, size) if isinstance(size, int) else size
    clip = built.encoder.to("meta").clip
    images = torch.zeros(2, 3, height, width, device="meta")
    texts = torch.zeros(2, built.context_length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        (clip.encode_image(images).sum() + clip.encode_text(texts).sum()).backward()
    loss = 6.0 * local_batch_size * global_batch_size * built.embed_dim
    return counter.get_total_flops() / 2 * local_batch_size + loss


def gemm_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """Measure FLOPs per second of the fastest plain matrix product.

    Args:
        device: where.
        dtype: of the matrices.
        seconds: time for each size and library.
    """
    best = 0.0
    for side in _SIDES[device.type]:
        left, right = torch.randn(2, side, side, device=device).to(dtype).unbind()
        runs: list[Callable[[Tensor, Tensor], Tensor]] = [torch.mm]
        if uses_onednn(left):
            runs.append(product)
        for run in runs:
            best = max(best, 2.0 * side**3 / _least_seconds(run, left, right, seconds))
    return best


def _least_seconds(
    run: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, seconds: float
) -> float:
    repeats = 10 if left.device.type == "cuda" else 1
    least, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(repeats):
            run(left, right)
        if left.device.type == "cuda":
            torch.cuda.synchronize(left.device)
        least = min(least, (time.perf_counter() - started) / repeats)
    return least


Phase = Literal["data", "towers", "loss", "optimizer", "rest"]
PHASES: tuple[Phase, ...] = ("data", "towers", "loss", "optimizer", "rest")

# Lightning's names of what it does, without the class they begin with. Inside training_step and
# backward the loss's own hooks cut.
_BEGINS: dict[str, Phase] = {
    "train_dataloader_next": "data",
    "batch_to_device": "data",
    "training_step": "towers",
    "optimizer_zero_grad": "optimizer",
    "backward": "loss",
    "configure_gradient_clipping": "optimizer",
}
# Clipping is followed by the optimizer's step, which ends with "optimizer_step".
_ENDS = (_BEGINS.keys() | {"optimizer_step"}) - {"configure_gradient_clipping"}


class PhaseLine:
    """Time, cut into phases and steps.

    Args:
        device: whose time it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuts: list[tuple[Phase, Any]] = []
        self._step_ends: list[int] = []

    def enter(self, phase: Phase) -> None:
        """Begin a phase, whatever the last one was."""
        self._cuts.append((phase, self._now()))

    def end_step(self) -> None:
        """End a step; what follows until the next phase is the rest of the next one."""
        self._step_ends.append(len(self._cuts))
        self.enter("rest")

    def seconds(self, first_step: int) -> dict[Phase, float]:
        """Add up the phases of the steps after ``first_step``.

        Args:
            first_step: steps at the beginning that do not count, at least 1.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        first, last = self._step_ends[first_step - 1], self._step_ends[-1]
        totals = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in zip(
            self._cuts[first:last], self._cuts[first + 1 : last + 1], strict=True
        ):
            totals[phase] += self._between(start, end)
        return totals

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return end - start
        return start.elapsed_time(end) / 1e3


class StepClock(Callback):
    """Writes where the time of a run went, seen from the first rank.

    towers: forward and backward, with the exchange of their gradients. loss: forward, backward up
    to the gradients of the features, and its exchange. data: waiting for a batch, its way to the
    device and normalisation. optimizer: clipping and step. rest: logging, callbacks, Lightning.
    Beside them the time of the processors, which other processes do not make longer.

    Args:
        path: of the JSON to write.
        first_step: steps at the beginning that do not count, at least 1.

    Raises:
        UserError: if ``first_step`` leaves no step to measure.
    """

    def __init__(self, path: str, first_step: int) -> None:
        self.path = Path(path)
        self.first_step = first_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the matrix products on all ranks at once, then begin."""
        if not 1 <= self.first_step < trainer.max_steps:
            raise UserError(
                f"first_step ({self.first_step}) must be at least 1 and below max_steps "
                f"({trainer.max_steps})"
            )
        self._device = trainer.strategy.root_device
        self._gemm_rate = self._measure_products(trainer)
        self._line = PhaseLine(self._device)
        trainer.profiler = _PhaseProfiler(self._line)  # type: ignore[attr-defined]  # Lightning's
        _watch_loss(pl_module.get_submodule("loss"), self._line)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Cut the line at the end of a step."""
        self._line.end_step()
        if trainer.global_step == self.first_step:
            self._processor_start = _processor_seconds()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was measured."""
        found = {
            "steps": trainer.max_steps - self.first_step,
            "seconds": self._line.seconds(self.first_step),
            "processor_seconds": _processor_seconds() - self._processor_start,
            "peak_bytes": peak_bytes(self._device),
            "gemm_flops_per_second": max(self._gemm_rate, self._measure_products(trainer)),
            "threads": torch.get_num_threads(),
        }
        if trainer.is_global_zero:
            write_atomically(self.path, json.dumps(found))

    def _measure_products(self, trainer: Trainer) -> float:
        trainer.strategy.barrier()
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        return gemm_rate(self._device, dtype)


class _PhaseProfiler(Profiler):
    """Cuts the line where Lightning says what it begins and ends."""

    def __init__(self, line: PhaseLine) -> None:
        super().__init__()
        self._line = line

    def start(self, action_name: str) -> None:
        """Begin the phase of an action, if it has one."""
        phase = _BEGINS.get(action_name.rpartition(".")[2])
        if phase is not None:
            self._line.enter(phase)

    def stop(self, action_name: str) -> None:
        """Go back to the rest."""
        if action_name.rpartition(".")[2] in _ENDS:
            self._line.enter("rest")


def _watch_loss(loss: nn.Module, line: PhaseLine) -> None:
    """Cut the line where the loss begins and ends, forward and backward."""

    def begins(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        arrived: list[bool] = []

        def gradient_arrives(gradient: Tensor) -> None:
            # Autograd finishes the loss before it enters a tower: the first arrival is its end.
            if not arrived:
                line.enter("towers")
            arrived.append(True)

        for features in arguments[:2]:
            if features.requires_grad:
                features.register_hook(gradient_arrives)
        line.enter("loss")

    def ends(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        line.enter("rest")

    loss.register_forward_pre_hook(begins)
    loss.register_forward_hook(ends)


def _processor_seconds() -> float:
    """Time that the processors worked for this process, whoever else uses them."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the allocator on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
