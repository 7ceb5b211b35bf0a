"""Skipped steps: a step whose loss, gradient or gradient norm is bad is left out on all ranks.

``StepCheck`` decides on the device. Many bad steps in a row end the run, or send weights and
moments back to an earlier checkpoint; the step, the learning rate and the position in the data stay
where they are, so that other batches follow.

A line of RUN/skipped_steps.jsonl is {"step": optimizer steps done with it, "time": Unix seconds,
"reason": text, "loss": of the global batch, "grad_norm": before clipping, "not_finite": samples
whose features were not, "samples": {shard: keys} of the global batch}. Without shards samples are
numbers, those of ``sample_ids``.

Source: Chowdhery et al. 2022, arXiv:2204.02311, section 5.1: training restarted from a checkpoint
before a spike of the loss, past the batches around it, did not spike again.
"""

import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.remote.locations import redact
from dist_siglip.distributed import gather_rows, max_over_ranks, sum_over_ranks
from dist_siglip.errors import RunFailedError, UserError
from dist_siglip.runs import RunFolder
from dist_siglip.runs.checkpoints.selection import damage_of
from dist_siglip.runs.checkpoints.sharded import by_number
from dist_siglip.system.best_effort import LineLog
from dist_siglip.training.optim import NormHistory, StepCheck, StepFinding
from dist_siglip.training.optim.evaluation_weights import take_training_weights

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
        take_training_weights(checkpoint)
        trainer.strategy.load_model_state_dict({"state_dict": checkpoint["state_dict"]})
        states = [by_number(state) for state in checkpoint["optimizer_states"]]
        trainer.strategy.load_optimizer_state_dict({"optimizer_states": states})
    return True


@dataclass(frozen=True)
class SkippedStep:
    """A skipped step, the same on every rank.

    Attributes:
        step: optimizer steps done, this one counted.
        loss: of the global batch.
        norm: of the gradient before clipping.
        sample_ids: of the global batch, in rank order.
        bad_ids: of samples with a feature that is not finite.
        scale: of a GradScaler; None if there is none.
        bad_terms: of objectives, that are not finite.
    """

    step: int
    loss: float
    norm: float
    sample_ids: list[int]
    bad_ids: list[int]
    scale: float | None
    bad_terms: Sequence[str] = ()

    @property
    def is_search_for_scale(self) -> bool:
        """Whether a GradScaler only tried too large a factor, which is no failure."""
        is_large = self.scale is not None and self.scale > 1
        return is_large and math.isfinite(self.loss) and not math.isfinite(self.norm)

    @property
    def reason(self) -> str:
        """Why it was skipped, in words."""
        if not math.isfinite(self.loss):
            # Features that are not finite spoil every term.
            terms = "" if self.bad_ids else ", ".join(self.bad_terms)
            return f"loss is not finite by its term {terms}" if terms else "loss is not finite"
        if not math.isfinite(self.norm):
            return "gradient is not finite"
        return f"gradient norm {self.norm:.4g} is a spike"


def collect(step: int, finding: StepFinding, world_size: int) -> SkippedStep:
    """Bring together what the ranks know about a skipped step.

    Distributed contract: every rank calls it with its own finding; three small collectives.
    """
    ids = gather_rows(finding.sample_ids).tolist()
    bad = gather_rows(finding.bad_rows).tolist()
    return SkippedStep(
        step=step,
        loss=sum_over_ranks(finding.loss).item() / world_size,
        norm=finding.norm.item(),
        sample_ids=ids,
        bad_ids=[sample_id for sample_id, is_bad in zip(ids, bad, strict=True) if is_bad],
        scale=finding.scale,
        bad_terms=[name for name, term in finding.terms.items() if not math.isfinite(term.item())],
    )


class SkippedStepLog:
    """Appends to RUN/skipped_steps.jsonl, on the first rank.

    Args:
        path: the file.
        table: that names the samples; None if they have no shards.
    """

    def __init__(self, path: Path, table: PairTable | None) -> None:
        self._lines = LineLog(path, "skipped steps")
        self._table = table

    def append(self, skipped: SkippedStep) -> str:
        """Add one line; return a short description for the log."""
        bad = self._list(skipped.bad_ids)
        record = {
            "step": skipped.step,
            "time": round(time.time(), 3),
            "reason": skipped.reason,
            "loss": _as_json(skipped.loss),
            "grad_norm": _as_json(skipped.norm),
            "not_finite": bad,
            "samples": self._group(skipped.sample_ids),
        }
        self._lines.append(json.dumps(record))
        if not bad:
            return skipped.reason
        whose = f"{len(bad)} of {len(skipped.sample_ids)} samples"
        return f"{skipped.reason}; {whose} gave features that are not, first {bad[0]}"

    def _list(self, sample_ids: list[int]) -> list[Any]:
        if self._table is None:
            return sample_ids
        return [
            f"{redact(shard)}/{_key(key, sample_id)}"
            for (shard, key), sample_id in self._named(self._table, sample_ids)
        ]

    def _group(self, sample_ids: list[int]) -> list[int] | dict[str, list[str]]:
        if self._table is None:
            return sample_ids
        grouped: dict[str, list[str]] = {}
        for (shard, key), sample_id in self._named(self._table, sample_ids):
            grouped.setdefault(redact(shard), []).append(_key(key, sample_id))
        return grouped

    @staticmethod
    def _named(
        table: PairTable, sample_ids: list[int]
    ) -> Iterable[tuple[tuple[str, str | None], int]]:
        return zip(table.names(sample_ids), sample_ids, strict=True)


def _key(key: str | None, sample_id: int) -> str:
    """Key of a sample; its number in the data set if the shard has changed since."""
    return f"sample {sample_id}" if key is None else key


def _as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


_STATE = "step_guard"
_MOST_PENDING = 100  # steps whose findings wait on the device


class SkipBadSteps(Callback):
    """Skips steps that would spoil the weights, on all ranks together.

    A skipped step changes no parameter, no moment and no count of the optimizer; the step number,
    the learning rate and the position in the data go on. Its samples are in
    RUN/skipped_steps.jsonl, ``train/skipped_steps`` counts them. What was skipped is read at
    logged steps, and every 100 steps at least: until then the host waits for nothing, and that is
    when a run is ended or sent back.

    With precision 16-mixed a gradient that overflows because of its factor is not counted.

    Args:
        action: "skip" skips steps; "off" lets a loss that is not finite end the run.
        abort_after: skipped steps in a row that end the run.
        spike_factor: also skips steps whose gradient norm is above so many times the median of the
            last ``spike_window``; 10 is a cautious start. Null does not.
        spike_window: steps that the median is of; the first quarter of them is not judged.
        roll_back_after: skipped steps in a row after which weights and optimizer go back to the
            newest checkpoint before them, once in a row. Null never does.

    Raises:
        UserError: if a setting is out of range; later, if roll_back_after meets an average of the
            weights.
    """

    def __init__(
        self,
        action: Literal["skip", "off"] = "skip",
        abort_after: int = 10,
        spike_factor: float | None = None,
        spike_window: int = 128,
        roll_back_after: int | None = None,
    ) -> None:
        if action not in ("skip", "off"):
            raise UserError(f"step_guard.action ({action}) must be skip or off")
        for name, value in (("abort_after", abort_after), ("spike_window", spike_window)):
            if value < 1:
                raise UserError(f"step_guard.{name} ({value}) must be at least 1")
        if spike_factor is not None and not 1 < spike_factor < math.inf:
            raise UserError(f"step_guard.spike_factor ({spike_factor}) must be above 1, or null")
        if roll_back_after is not None and not 1 <= roll_back_after < abort_after:
            raise UserError(
                f"step_guard.roll_back_after ({roll_back_after}) must be at least 1 and below "
                f"abort_after ({abort_after}), or null"
            )
        self.action = action
        self.abort_after = abort_after
        self.roll_back_after = roll_back_after
        self.history = None if spike_factor is None else NormHistory(spike_factor, spike_window)
        self.num_skipped = 0
        self._in_a_row: list[int] = []
        self._has_rolled_back = False
        self._check: StepCheck | None = None
        self._log: SkippedStepLog | None = None
        self._statistics: list[Tensor] = []
        self._pending: list[tuple[int, StepFinding]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be guarded."""
        if self.action == "off" or stage != "fit":
            return
        if not hasattr(pl_module, "step_check"):
            raise UserError(
                f"step_guard cannot skip steps of {type(pl_module).__name__}; set action to off"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's
        if self.roll_back_after and any(isinstance(c, WeightAveraging) for c in callbacks):
            raise UserError(
                f"step_guard.roll_back_after ({self.roll_back_after}) cannot send an average of "
                "the weights back; leave it out, or WeightAverage"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the check into the module."""
        if self.action == "off":
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._check = StepCheck(self.history, scaler)
        _give(pl_module, self._check)
        self._statistics = [
            buffer
            for part in pl_module.modules()
            if isinstance(part, _BatchNorm)
            for buffer in part.buffers(recurse=False)
        ]
        if trainer.is_global_zero:
            position = getattr(trainer.datamodule, "position", None)  # type: ignore[attr-defined]
            path = RunFolder(Path(trainer.default_root_dir)).skipped_steps
            self._log = SkippedStepLog(path, None if position is None else position.table)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy running statistics, which the forward pass moves."""
        if self._check is not None:
            self._check.keep(self._statistics)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what was found in the step; on logged steps read it and act."""
        found = None if self._check is None else self._check.take()
        if found is None:
            return
        self._pending.append((trainer.global_step, found))
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning
        is_logged = bool(every) and trainer.global_step % every == 0
        if is_logged or len(self._pending) >= _MOST_PENDING:
            self._settle(trainer)
            self._act(trainer)
        if is_logged:
            pl_module.log("train/skipped_steps", float(self.num_skipped))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what is left."""
        self._settle(trainer)
        self._act(trainer)
        if self._check is not None:
            self._check = None
            _give(pl_module, None)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write down counts and norms, so that a resumed run judges as this one would."""
        if self.action == "off":
            return
        self._settle(trainer)
        checkpoint[_STATE] = {
            "num_skipped": self.num_skipped,
            "in_a_row": list(self._in_a_row),
            "has_rolled_back": self._has_rolled_back,
            "norms": torch.empty(0) if self.history is None else self.history.values,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take them over."""
        state = checkpoint.get(_STATE)
        if state is None:
            return
        self.num_skipped = state["num_skipped"]
        self._in_a_row = list(state["in_a_row"])
        self._has_rolled_back = state["has_rolled_back"]
        if self.history is not None:
            self.history.restore(state["norms"])

    def _settle(self, trainer: Trainer) -> None:
        """Read the findings that wait; all ranks together, for they find the same."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        flags = torch.stack([found.is_skipped for _, found in pending]).tolist()
        for (step, found), is_skipped in zip(pending, flags, strict=True):
            if not is_skipped:
                self._in_a_row, self._has_rolled_back = [], False
                continue
            skipped = collect(step, found, trainer.world_size)
            if not skipped.is_search_for_scale:
                self._count(skipped)

    def _count(self, skipped: SkippedStep) -> None:
        self.num_skipped += 1
        self._in_a_row.append(skipped.step)
        if self._log is not None:
            text = self._log.append(skipped)
            logger.warning("step %d was skipped on all ranks: %s", skipped.step, text)

    def _act(self, trainer: Trainer) -> None:
        """End the run, or send it back, if too many steps in a row were skipped."""
        count = len(self._in_a_row)
        if count >= self.abort_after:
            raise RunFailedError(
                f"{count} steps in a row were skipped, {self._in_a_row[0]} to "
                f"{self._in_a_row[-1]}, and step_guard.abort_after is {self.abort_after}; their "
                "reasons and samples are in skipped_steps.jsonl of the run folder; mend the data, "
                "lower model.optim.learning_rate, or set step_guard.roll_back_after"
            )
        if not self.roll_back_after or count < self.roll_back_after or self._has_rolled_back:
            return
        self._has_rolled_back = True
        first = self._in_a_row[0]
        # The checkpoint of the step just before them would hold the weights there are.
        step = roll_back(trainer, first - 1)
        if not trainer.is_global_zero:
            return
        if step is None:
            logger.warning("no checkpoint before step %d to go back to; going on", first - 1)
        else:
            logger.warning(
                "weights and optimizer are back at step %d after %d skipped steps in a row; data "
                "and schedule go on after step %d",
                step,
                count,
                trainer.global_step,
            )


def _give(module: Any, check: StepCheck | None) -> None:
    module.step_check = check
