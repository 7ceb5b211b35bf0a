"""Callback that writes checkpoints, keeps the newest and the best, and bears failures."""

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import Strategy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from dist_siglip.distributed import new_cpu_group
from dist_siglip.errors import RunFailedError, UserError, check_least
from dist_siglip.runs import BestCheckpoint, Mode, RunFolder, read_best
from dist_siglip.runs.checkpoints.io import BackgroundWrite, Snapshot
from dist_siglip.system.atomic import sync_folder
from dist_siglip.system.lightning_compat import dump_checkpoint

logger = logging.getLogger(__name__)


class _Problem(NamedTuple):
    text: str
    is_moved: bool


class RunCheckpoint(Checkpoint):
    """Checkpoints of a run, named by optimizer step, the newest and the best kept.

    A checkpoint holds weights, optimizer, schedule and the position in the data. Older ones are
    removed only after a newer one is complete. If one cannot be written, all ranks go on together
    and try again at the next time; the last one of a run has to be written.

    Args:
        every_steps: optimizer steps between two checkpoints; one more is written at the end.
        keep: number of newest checkpoints kept.
        keep_best_of: a metric, such as val/loss; the checkpoint of the evaluation where it was
            best is kept, too, and written if it is not there. Null keeps none.
        keep_best_mode: whether the best value is the smallest or the largest.
        asynchronous: copy to the memory of the host and write from there while training goes on.
        allowed_misses: checkpoints in a row that may fail; the next one ends the run.

    Raises:
        UserError: if a number is out of range; later, if there is no such metric.
    """

    def __init__(
        self,
        every_steps: int = 1000,
        keep: int = 2,
        keep_best_of: str | None = None,
        keep_best_mode: Mode = "min",
        asynchronous: bool = False,
        allowed_misses: int = 3,
    ) -> None:
        check_least(1, of="checkpoint.", every_steps=every_steps, keep=keep)
        check_least(0, of="checkpoint.", allowed_misses=allowed_misses)
        if keep_best_mode not in ("min", "max"):
            raise UserError(f"checkpoint.keep_best_mode ({keep_best_mode}) must be min or max")
        self.every_steps = every_steps
        self.keep = keep
        self.keep_best_of = keep_best_of
        self.keep_best_mode: Mode = keep_best_mode
        self.asynchronous = asynchronous
        self.allowed_misses = allowed_misses
        self._background = BackgroundWrite()
        self._copied: Snapshot | None = None  # to be waited for before the weights change
        self._written_step = -1
        self._misses = 0
        self._candidate: BestCheckpoint | None = None
        self._is_training_run = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what a killed writer left, and see what is there."""
        folder = _folder(trainer)
        if trainer.is_global_zero:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.path)
            _remove_unfinished(folder)
        there = folder.checkpoint(trainer.global_step).exists()
        self._written_step = trainer.global_step if there else -1
        if self.keep_best_of is not None and not trainer.enable_validation:
            raise UserError(
                f"checkpoint.keep_best_of ({self.keep_best_of}) needs evaluations; name "
                "data.val_shards, or leave it out"
            )
        if self.asynchronous:
            _prepare(trainer.strategy)
        self._is_training_run = True
        # An evaluation that a killed start owed was made up for before this hook.
        if self._candidate is not None and self._candidate.step == self._written_step:
            self._keep_if_best(trainer, self._candidate)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when it is time."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning's: writes nothing
            return
        step = trainer.global_step
        if step % self.every_steps == 0 and step not in (self._written_step, self._background.step):
            self._write(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Let the step wait for the copy of what it changes."""
        self._hold()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let an evaluation wait for the copy: an average may take the place of the weights."""
        self._hold()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the checkpoint of these weights if they are the best so far."""
        is_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # Lightning's
        if self.keep_best_of is None or trainer.sanity_checking or is_dev_run:
            return
        value = trainer.callback_metrics.get(self.keep_best_of)
        if value is None:
            known = ", ".join(sorted(n for n in trainer.callback_metrics if n.startswith("val/")))
            raise UserError(
                f"checkpoint.keep_best_of ({self.keep_best_of}) is no metric of an evaluation; use "
                f"one of {known}"
            )
        step = getattr(pl_module, "steps_done", trainer.global_step)
        self._candidate = BestCheckpoint(step, self.keep_best_of, float(value))
        if self._is_training_run:
            self._keep_if_best(trainer, self._candidate)

    def _keep_if_best(self, trainer: Trainer, found: BestCheckpoint) -> None:
        best = read_best(_folder(trainer), found.metric, self.keep_best_mode)
        if not trainer.strategy.broadcast(best.is_beaten_by(found.value, self.keep_best_mode)):
            self._candidate = None
        elif found.step == self._written_step:
            self._tidy_up(trainer)
        elif found.step != self._background.step:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step, unless it just was, and wait for it."""
        self._finish(trainer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning's: writes nothing
            return
        if trainer.global_step != self._written_step:
            self._write(trainer, is_last=True)
        elif trainer.should_stop:
            # Written before the evaluation that had the run end, whose findings belong into it.
            self._write(trainer)
            self._finish(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let a checkpoint that is being written become whole."""
        self._background.wait()

    def _write(self, trainer: Trainer, *, is_last: bool = False) -> None:
        """Save on all ranks together."""
        self._finish(trainer)
        step, strategy = trainer.global_step, trainer.strategy
        path = _folder(trainer).checkpoint(step)
        checkpoint = dump_checkpoint(trainer)
        if self.asynchronous and not is_last:
            copied = Snapshot(checkpoint if _takes_part(strategy) else {})
            self._copied = copied
            if any(isinstance(layer, _BatchNorm) for layer in trainer.lightning_module.modules()):
                self._hold()  # the next forward pass moves its statistics
            self._background.start(step, lambda: strategy.save_checkpoint(copied.read(), path))
            return
        problem = None
        try:
            strategy.save_checkpoint(checkpoint, path)
        except OSError as error:
            problem = _Problem(_reason(error), _folder(trainer).is_moved())
        self._conclude(trainer, step, problem, is_last=is_last)

    def _hold(self) -> None:
        if self._copied is not None:
            self._copied.hold()
            self._copied = None

    def _finish(self, trainer: Trainer) -> None:
        """Wait for the checkpoint that is being written, if any."""
        step = self._background.step
        if step is None:
            return
        problem = None
        try:
            self._background.finish()
        except OSError as error:
            problem = _Problem(_reason(error), _folder(trainer).is_moved())
        self._conclude(trainer, step, problem)

    def _conclude(
        self, trainer: Trainer, step: int, problem: _Problem | None, *, is_last: bool = False
    ) -> None:
        """Hear on all ranks how it went with the first; remove old ones, or count a miss."""
        problem = trainer.strategy.broadcast(problem)
        if problem is not None and problem.is_moved:
            raise _folder(trainer).moved()
        if problem is None:
            self._misses = 0
            self._written_step = step
            self._tidy_up(trainer)
            return
        self._misses += 1
        folder = _folder(trainer)
        there = _newest_there(folder)
        if is_last:
            raise RunFailedError(
                f"the last checkpoint, of step {step}, could not be written ({problem.text}); "
                f"{there}; make room in {folder.checkpoints} and start again"
            )
        if self._misses > self.allowed_misses:
            raise RunFailedError(
                f"{self._misses} checkpoints in a row could not be written, the last one of step "
                f"{step} ({problem.text}); {there}; make room in {folder.checkpoints} and start "
                "again"
            )
        if trainer.is_global_zero:
            logger.warning(
                "checkpoint of step %d was not written (%s); %s; training goes on, miss %d of %d "
                "in a row",
                step,
                problem.text,
                there,
                self._misses,
                self.allowed_misses,
            )

    def _tidy_up(self, trainer: Trainer) -> None:
        """Let rank 0 note the best and remove what is no longer kept."""
        step, candidate = self._written_step, self._candidate
        if candidate is not None and candidate.step <= step:
            self._candidate = None
        if not trainer.is_global_zero:
            return
        folder = _folder(trainer)
        try:
            if candidate is not None and candidate.step == step:
                candidate.write(folder)
                logger.info(
                    "best %s so far: %.6g, step %d", candidate.metric, candidate.value, step
                )
            # Newer ones can only be damaged: the run would have gone on from them.
            older = [each for each in folder.steps_with_checkpoint() if each <= step]
            kept = set(older[-self.keep :])
            if self.keep_best_of is not None:
                kept.add(read_best(folder, self.keep_best_of, self.keep_best_mode).step)
            for each in older:
                if each not in kept:
                    trainer.strategy.remove_checkpoint(folder.checkpoint(each))
        except OSError as error:
            logger.warning("%s could not be tidied up (%s)", folder.checkpoints, _reason(error))


def _folder(trainer: Trainer) -> RunFolder:
    return RunFolder(Path(trainer.default_root_dir))


def _newest_there(folder: RunFolder) -> str:
    """Say which checkpoint there is to go on from."""
    try:
        newest = folder.newest_checkpoint()
    except OSError as error:
        return f"{folder.checkpoints} cannot be read ({_reason(error)})"
    return f"the newest is {newest.name}" if newest else "there is none yet"


def _remove_unfinished(folder: RunFolder) -> None:
    left = folder.unfinished()
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if left:
        logger.info("removed %d checkpoints that a killed process had begun", len(left))


def _prepare(strategy: Strategy) -> None:
    """Give a strategy whose ranks write together a group that a thread may use.

    Raises:
        UserError: if a strategy has its own way to write that is not known to allow a thread.
    """
    if type(strategy).save_checkpoint is Strategy.save_checkpoint:
        return
    if not hasattr(strategy, "checkpoint_group"):
        raise UserError(
            f"checkpoint.asynchronous (true) is not known to work with {type(strategy).__name__}; "
            "leave it out"
        )
    strategy.checkpoint_group = new_cpu_group()


def _takes_part(strategy: Strategy) -> bool:
    """Whether this rank has anything to write."""
    return strategy.is_global_zero or hasattr(strategy, "checkpoint_group")


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())[:160] or type(error).__name__
