"""Callback that ends a stalled run and names the rank that stalls it.

Two limits. A collective gives up by itself (``collective_minutes``), which ends ranks that wait for
one that is gone. And a thread on every rank watches how long the main one takes for each part of a
step (``stall_minutes``), which also ends a rank that hangs in its data or its disk, and names it.
"""

import logging
import os
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import distributed_c10d
from torch.distributed.constants import default_pg_timeout

from dist_siglip.data.samples.loader import loader_failure
from dist_siglip.distributed import resolve_group
from dist_siglip.distributed.waiting import is_inside
from dist_siglip.errors import LoaderError, UserError
from dist_siglip.health.hang_watchdog import DeviceProgress, HangWatchdog, Heartbeat
from dist_siglip.runs import RunFolder
from dist_siglip.system.lightning_compat import collective_timeout

logger = logging.getLogger(__name__)

# Where torch writes down the last NCCL collectives when one of them gives up; it adds the rank.
_FLIGHT_RECORD = "TORCH_FR_DUMP_TEMP_FILE"


class _Phase(NamedTuple):
    name: str
    order: int
    is_slow: bool


_STARTING = _Phase("getting ready", 0, is_slow=True)
_DATA = _Phase("waiting for data", 1, is_slow=False)
_STEP = _Phase("step", 2, is_slow=False)
_SAVING = _Phase("saving a checkpoint", 3, is_slow=True)
_EVALUATION = _Phase("evaluation", 4, is_slow=True)
_ENDING = _Phase("ending", 5, is_slow=True)


class Watchdog(Callback):
    """Ends every rank with code 70 when one of them hangs, after a line that names it.

    The line goes to stderr and the log; RUN/stacks/rank=00000.txt and so on hold what every thread
    of a rank was doing.

    Args:
        collective_minutes: ranks wait for each other in a collective at most; more than the first
            one needs to write a checkpoint. A strategy with a time limit of its own keeps it.
        stall_minutes: a step, or the wait for its batch, may take on a rank. null
            disables the watchdog.
        slow_minutes: what is slow by nature may take: all up to the end of the first step, each
            batch of an evaluation, its metrics, a checkpoint.

    Raises:
        UserError: if a limit is not above 0, or slow_minutes is below stall_minutes.
    """

    def __init__(
        self,
        collective_minutes: float = 10.0,
        stall_minutes: float | None = 8.0,
        slow_minutes: float = 30.0,
    ) -> None:
        for name, minutes in (
            ("collective_minutes", collective_minutes),
            ("stall_minutes", stall_minutes),
            ("slow_minutes", slow_minutes),
        ):
            if minutes is not None and not minutes > 0:
                raise UserError(f"watchdog.{name} ({minutes}) must be above 0")
        if stall_minutes is not None and slow_minutes < stall_minutes:
            raise UserError(
                f"watchdog.slow_minutes ({slow_minutes}) must be at least stall_minutes "
                f"({stall_minutes})"
            )
        self.collective_minutes = collective_minutes
        self.stall_minutes = stall_minutes
        self.slow_minutes = slow_minutes
        self._is_first_step = True
        self._watchdog: HangWatchdog | None = None
        self._device: DeviceProgress | None = None
        self._heartbeat = self._heartbeat_of(_STARTING, 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Limit the collectives and begin to watch."""
        group = resolve_group(None)
        if group is not None:
            self._limit(trainer, group)
        if self.stall_minutes is None:
            return
        self._is_first_step = True
        self._pass(_STARTING, trainer.global_step)
        is_on_gpu = trainer.strategy.root_device.type == "cuda"
        self._device = DeviceProgress(_record_event) if is_on_gpu else None
        self._watchdog = HangWatchdog(
            self._newest_heartbeat,
            stacks=_stacks(trainer) / f"rank={trainer.global_rank:05d}.txt",
            group=group,
            end_children=lambda: end_children(trainer),
            device=self._device,
        )
        self._watchdog.start()

    def _limit(self, trainer: Trainer, group: dist.ProcessGroup) -> None:
        """Give the group its time limit; have torch write its record of collectives beside ours."""
        if collective_timeout(trainer.strategy) in (None, default_pg_timeout):
            # torch before 2.15 had it under another name.
            name = "set_timeout" if hasattr(dist, "set_timeout") else "_set_pg_timeout"
            getattr(distributed_c10d, name)(timedelta(minutes=self.collective_minutes), group)
        os.environ.setdefault(_FLIGHT_RECORD, str(_stacks(trainer).absolute() / "nccl_rank="))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there."""
        self._pass(_STEP, trainer.global_step + 1)
        self._mark(trainer.global_step + 1)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        """The exchange is launched."""
        self._mark(trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done."""
        self._is_first_step = False
        self._mark(trainer.global_step)
        self._pass(_DATA, trainer.global_step + 1)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint is being put together."""
        self._pass(_SAVING, trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An evaluation begins."""
        self._pass(_EVALUATION, trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A batch of the evaluation is done."""
        self._pass(_EVALUATION, trainer.global_step)

    def note_evaluation(self, trainer: Trainer) -> None:
        """Note progress of an evaluation of another kind, or of a test."""
        self._pass(_EVALUATION, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next step is due."""
        self._pass(_DATA, trainer.global_step + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows is the last checkpoint and the farewell."""
        self._pass(_ENDING, trainer.global_step)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tell the others; say so if this rank fails only because another one did."""
        if self._watchdog is None:
            return
        if isinstance(exception, (KeyboardInterrupt, SystemExit)):
            self._watchdog.stop()
            return
        cause = self._watchdog.explain(loader_failure(exception) or exception)
        found = self._watchdog.verdict
        if found is not None and found.exit_code == LoaderError.exit_code:
            # The command line tells it, and ends with that code, on every rank.
            if loader_failure(exception) is None:
                while exception.__cause__ is not None:
                    exception = exception.__cause__
                exception.__cause__ = LoaderError(found.line)
        elif cause is not None:
            logger.error("a collective failed: %s", cause)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch no longer."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None

    def _newest_heartbeat(self) -> Heartbeat:
        """Return the newest heartbeat; frames of the main thread tell whether it still saves."""
        newest = self._heartbeat
        is_saving = newest.phase == _SAVING.name
        if is_saving and not is_inside("save_checkpoint") and newest is self._heartbeat:
            self._pass(_DATA, newest.step + 1)
        return self._heartbeat

    def _mark(self, step: int) -> None:
        if self._device is not None:
            self._device.mark(step)

    def _pass(self, phase: _Phase, step: int) -> None:
        self._heartbeat = self._heartbeat_of(phase, step)

    def _heartbeat_of(self, phase: _Phase, step: int) -> Heartbeat:
        is_slow = phase.is_slow or self._is_first_step or self.stall_minutes is None
        minutes = self.slow_minutes if is_slow else self.stall_minutes
        assert minutes is not None
        return Heartbeat(step=step, phase=phase.name, order=phase.order, limit_seconds=60 * minutes)


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def _stacks(trainer: Trainer) -> Path:
    return RunFolder(Path(trainer.default_root_dir)).stacks


def end_children(trainer: Trainer) -> None:
    """End the ranks that Lightning's own launcher has started; one that is stopped as well."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        if isinstance(process, subprocess.Popen):
            process.kill()
