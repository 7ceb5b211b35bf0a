"""Preemption: all ranks stop at the same step and save, and the job is requeued if asked.

Each rank remembers signals on its own (``system.signals``). Every few steps they compare, between
CPUs so that no GPU is waited for: what a rank asks rides along with the handshake of the step's
exchange. If any was asked, all end the step loop, write a checkpoint and leave. The run goes on
from there when it is started again.

Lightning answers SIGTERM inside the handler, by a broadcast that deadlocks with an exchange under
way, and asks the first rank in every step whether it was signalled, for which the host waits for
the device. Both are switched off.

SLURM ends the processes of a job as soon as it is requeued, so that comes last. A cancelled job
would come back to life, so its state is asked for first.

Lightning also ends a run quietly, after fewer steps than asked for (``EarlyStopping``,
``max_time``); ``reason_of_early_end`` says why.
"""

import logging
import os
import subprocess
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

from dist_siglip.distributed import ask_all_ranks, control_group, heard_from_ranks
from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder
from dist_siglip.system import signals
from dist_siglip.system.lightning_compat import broadcast_no_sigterm, install_no_handlers

logger = logging.getLogger(__name__)


def end_training(trainer: Trainer) -> None:
    """Have training end after the step under way; ``RunCheckpoint`` saves there.

    Distributed contract: every rank calls it at the same step.
    """
    # Not should_stop, for which Lightning would evaluate first, and which min_steps overrules.
    trainer.fit_loop.epoch_loop.max_steps = trainer.global_step


def stop_again(trainer: Trainer) -> None:
    """Stop a run that goes on from the checkpoint of a stop by ``EarlyStopping``.

    Its patience is in the checkpoint and exhausted, but it looks only after the next evaluation.
    """
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's
    if any(_message(each) for each in callbacks if isinstance(each, EarlyStopping)):
        trainer.should_stop = True


def reason_of_early_end(trainer: Trainer) -> str:
    """Say why ``fit`` returned before ``max_steps``, as the end of a sentence."""
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and (message := _message(callback)):
            return f"EarlyStopping: {message}"
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            spent = timedelta(seconds=int(callback.time_elapsed()))  # type: ignore[attr-defined]
            return f"its time (max_time) is over: {spent} were spent training"
    if trainer.should_stop:
        return "a callback set trainer.should_stop"
    if not trainer.limit_train_batches:
        return f"trainer.limit_train_batches is {trainer.limit_train_batches}"
    progress: Any = trainer.fit_loop.epoch_progress.current
    epochs, most = progress.processed, trainer.max_epochs
    if most is not None and 0 <= most <= epochs:
        return f"trainer.max_epochs is {most}"
    return "the training data ended"


def _message(callback: EarlyStopping) -> str:
    """Why it stopped, without Lightning's farewell; empty if it did not."""
    message = callback.stopping_reason_message or ""
    return message.replace(" Signaling Trainer to stop.", "").rstrip(". ")


_SECONDS = 30


def job_to_requeue(environ: Mapping[str, str]) -> str | None:
    """Return the name SLURM knows this job by; None outside of SLURM.

    Example:
        >>> job_to_requeue({"SLURM_JOB_ID": "7"})
        '7'
        >>> array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
        >>> job_to_requeue({"SLURM_JOB_ID": "7", **array})
        '5_2'
    """
    array = environ.get("SLURM_ARRAY_JOB_ID")
    if array and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def requeue_job() -> bool:
    """Ask SLURM to requeue this job, and say whether it will; failing is a warning."""
    job = job_to_requeue(os.environ)
    if job is None:
        logger.warning("stop.requeue (true) outside of SLURM: start the run again by hand")
        return False
    try:
        state = _ask("squeue", "--noheader", "--job", job, "--format=%T")
        if state != "RUNNING":
            logger.info("job %s is %s and is not requeued", job, state.lower() or "gone")
            return False
        _ask("scontrol", "requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        logger.warning("job %s was not requeued (%s); submit it again", job, reason)
        return False
    logger.info("job %s is requeued", job)
    return True


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    return done.stdout.strip()


# What the ranks may have to say; the largest wins: nobody has asked, a person, a cluster; the run
# folder is gone.
_NOBODY, _PERSON, _CLUSTER, _MOVED = range(4)


class Preemption(Callback):
    """Ends training between two steps once any rank was asked to: by a cluster, or by Ctrl-C.

    The signals, SIGUSR1, SIGUSR2, SIGTERM, SIGHUP and SIGINT, are those that
    ``signals.listening`` remembers; outside of it they keep their usual effect.
    ``RunCheckpoint`` saves where training ends. An evaluation that is due at that step waits for
    the next start.

    Args:
        agree_every_steps: optimizer steps between two looks at what was asked; a rank that was
            signalled trains on until then.
        requeue: once all ranks have saved, the first one has SLURM requeue the job. Leave it off
            where the batch script does so, as the ones in slurm/ do.

    Attributes:
        has_stopped: whether training ended because of a signal.
        is_interrupt: whether that was Ctrl-C, on all ranks that were asked.

    Raises:
        UserError: if agree_every_steps < 1.
        RunMovedError: later, on all ranks, if the first one finds that the run folder was moved.
    """

    def __init__(self, agree_every_steps: int = 10, requeue: bool = False) -> None:
        if agree_every_steps < 1:
            raise UserError(f"stop.agree_every_steps ({agree_every_steps}) must be at least 1")
        self.agree_every_steps = agree_every_steps
        self.requeue = requeue
        self.has_stopped = self.is_interrupt = False
        self._group: dist.ProcessGroup | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from installing handlers of its own."""
        install_no_handlers(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the question out of every step; stop what had stopped."""
        stop_again(trainer)
        broadcast_no_sigterm(trainer)
        self._group = control_group()
        signals.begin_saving()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before a step after which ranks agree: have its exchange say what this one asks."""
        ask_all_ranks(0)
        if (trainer.global_step + 1) % self.agree_every_steps == 0:
            heard_from_ranks()  # what was said before
            ask_all_ranks(self._asks(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every few steps, agree."""
        if trainer.global_step % self.agree_every_steps or self.has_stopped:
            return
        if trainer.global_step >= trainer.max_steps:
            return
        asked = self._agree(self._asks(trainer), heard_from_ranks())
        if asked == _MOVED:
            raise RunFolder(Path(trainer.default_root_dir)).moved()
        if asked == _NOBODY:
            return
        self.has_stopped, self.is_interrupt = True, asked == _PERSON
        end_training(trainer)
        trainer.limit_val_batches = 0
        if trainer.is_global_zero and not self.is_interrupt:
            logger.warning(
                "asked to stop (%s): saving after step %d; start again to go on",
                signals.received() or "another rank",
                trainer.global_step,
            )

    def _asks(self, trainer: Trainer) -> int:
        """What this rank has to say."""
        is_moved = RunFolder(Path(trainer.default_root_dir)).is_moved()
        return _MOVED if is_moved else _who_asks()

    def finish(self) -> None:
        """Note an interrupt that came too late for a step to end at: nothing waits for it now.

        Distributed contract: every rank calls it after ``fit``.
        """
        signals.end_saving()
        if not self.has_stopped and self._agree(_who_asks()) == _PERSON:
            self.has_stopped = self.is_interrupt = True

    def leave(self, trainer: Trainer) -> None:
        """Wait until every rank has saved, then requeue the job if asked to.

        Distributed contract: every rank calls it after ``fit`` if ``has_stopped``.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # aborted transfers can take a fabric down
        if self._group is not None:
            dist.barrier(self._group)
        if self.requeue and trainer.is_global_zero and not self.is_interrupt:
            requeue_job()

    def _agree(self, asked: int, heard: int | None = None) -> int:
        """Return the largest of what the ranks have to say: what was heard, if anything was."""
        if heard is not None:
            return heard
        if self._group is None:
            return asked
        flag = torch.tensor([asked])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return int(flag.item())


def _who_asks() -> int:
    """Say who has asked this rank to stop."""
    if signals.received() is None:
        return _NOBODY
    return _PERSON if signals.is_interrupted() else _CLUSTER
