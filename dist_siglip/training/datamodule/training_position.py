"""Position of training in the endless sequence of batches, and what a checkpoint keeps of it.

One integer counts the batches that were trained on. Loaders run ahead of training, and Lightning's
own epoch counter has moved on by the time a run stops early, so neither can say where training
stands; a small callback, first in line so that every checkpoint sees its count, does.

A checkpoint keeps what the sequence depends on, and one line for each shard, so that a refusal can
name the shards that came, went or changed, and data that grew can be accepted on purpose.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.order.position import BatchPlan, Progress
from dist_siglip.data.order.sequence import MixtureSequence, SingleSequence
from dist_siglip.errors import UserError

_LOGGER = logging.getLogger(__name__)
_REMEDY = "set it back, or start a new run in another folder"
# What other data change; everything else decides what a batch means.
_OF_THE_DATA = ("num_samples", "sources", "fingerprint")
_LENGTHS = "sequence_lengths"


def position_to_resume_at(
    plan: BatchPlan,
    lines: str,
    saved: Mapping[str, int | str],
    *,
    accept_changed_data: bool = False,
    remedy: str = _REMEDY,
) -> int:
    """Return the samples consumed from which a run goes on.

    Args:
        plan: what the run would read now.
        lines: its shards, from ``PairTable.shard_lines``.
        saved: what the checkpoint kept: ``plan.identity()`` of then, "samples_consumed", "shards".
        accept_changed_data: go on although the data changed. A single source begins its next epoch;
            a mixture keeps its position. Everything but the data must still be the same.
        remedy: what the error advises.

    Raises:
        UserError: if a value differs; names it, the value then and the value now.
    """
    consumed = int(saved["samples_consumed"])
    now = plan.identity()
    # Pictures of one size have no lengths; the order is the same with and without them.
    before = {_LENGTHS: now.get(_LENGTHS), **saved}
    differing = [name for name in now if before.get(name, "not recorded") != now[name]]
    if not differing:
        return consumed
    of_the_batches = [name for name in differing if name not in _OF_THE_DATA]
    if of_the_batches or not accept_changed_data:
        name = (of_the_batches or differing)[0]
        if of_the_batches:
            change = f"{name} was {saved.get(name, 'not recorded')} when the checkpoint was written"
            change += f" and is {now[name]} now"
        else:
            change = f"the training shards changed: {_change(saved, lines, now)}"
            remedy = f"{remedy}, or set accept_changed_data to go on with these"
        raise UserError(f"cannot resume at the exact sample: {change}; {remedy}")
    whole = int(saved["num_samples"]) // plan.global_batch_size * plan.global_batch_size
    if plan.sources or saved.get("sources") or not whole:
        return consumed
    return -(-consumed // whole) * plan.batches_per_epoch * plan.global_batch_size


def _change(saved: Mapping[str, int | str], lines: str, now: Mapping[str, int | str]) -> str:
    """Say what is different about the data."""
    changes = list(describe_shard_changes(str(saved.get("shards", "")), lines))
    if saved.get("sources") != now["sources"]:
        changes.append(f"sources were [{saved.get('sources')}] and are [{now['sources']}] now")
    if saved.get("num_samples") != now["num_samples"]:
        changes.append(f"{saved.get('num_samples')} samples then, {now['num_samples']} now")
    return "; ".join(changes) or "members of other names or sizes are read from them"


def describe_shard_changes(before: str, after: str) -> Iterator[str]:
    r"""Name what came, went and changed between two ``PairTable.shard_lines``.

    Example:
        >>> list(describe_shard_changes("a.tar\t3\t00\nb.tar\t2\t01", "a.tar\t4\t02"))
        ["1 shard is gone (first 'b.tar')", "1 shard changed (first 'a.tar': 3 samples, now 4)"]
    """
    if not before:
        return
    then, now = (dict(_parsed(lines)) for lines in (before, after))
    gone = [name for name in then if name not in now]
    new = [name for name in now if name not in then]
    changed = [name for name in then if name in now and then[name] != now[name]]
    if gone:
        yield f"{_counted(gone)} {_are(gone)} gone (first {gone[0]!r})"
    if new:
        yield f"{_counted(new)} {_are(new)} new (first {new[0]!r})"
    if changed:
        counts = [then[changed[0]][0], now[changed[0]][0]]
        how = f"{counts[0]} samples, now {counts[1]}" if counts[0] != counts[1] else "other members"
        yield f"{_counted(changed)} changed (first {changed[0]!r}: {how})"
    if not (gone or new or changed) and list(then) != list(now):
        yield "the same shards in another order"


def _parsed(lines: str) -> Iterator[tuple[str, tuple[str, str]]]:
    for line in lines.split("\n"):
        name, count, digest = line.rsplit("\t", 2)
        yield name, (count, digest)


def _counted(names: list[str]) -> str:
    return "1 shard" if len(names) == 1 else f"{len(names)} shards"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


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


def batches_to_repeat(trainer: Trainer | None) -> int | None:
    """Return how many batches, the first of the run, are trained on in turns; None for all.

    Lightning turns shuffling off and takes the first batches of each epoch, which here are others
    in each. So the sampler repeats them, and the loader runs on without end.

    Raises:
        UserError: if a share is asked for: the training data has no end.
    """
    asked: int | float = getattr(trainer, "overfit_batches", 0)  # not set in a script of one's own
    if trainer is None or not asked:
        return None
    if not isinstance(asked, int):
        raise UserError(
            f"trainer.overfit_batches ({asked}) must be a whole number of batches: the training "
            "data has no end to take a share of"
        )
    trainer.limit_train_batches = 1.0
    _LOGGER.info(
        "overfit_batches: trains on the first %d batches of the run, in turns; an evaluation sees "
        "as many batches of each rank",
        asked,
    )
    return asked


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


class TrainingPosition:
    """The position of a run in its training data, as a checkpoint keeps it.

    A state may be restored before the plan it belongs to exists.

    Args:
        accept_changed_data: resume although the shards changed.

    Attributes:
        accept_changed_data: as given.
        progress: samples consumed.
        plan: the sequence of batches, once it has begun.
    """

    def __init__(self, *, accept_changed_data: bool) -> None:
        self.progress = Progress()
        self.plan: BatchPlan | None = None
        self.accept_changed_data = accept_changed_data
        self._table: PairTable | None = None
        self._sequence: SingleSequence | MixtureSequence | None = None
        self._restored: dict[str, Any] | None = None

    def begin(self, plan: BatchPlan, table: PairTable) -> None:
        """Stand in the sequence of a plan over a table, where a restored state says.

        Raises:
            UserError: as ``restore``.
        """
        self.plan, self._table, self._sequence = plan, table, plan.sequence()
        self._resume()

    def state(self) -> dict[str, Any]:
        """Samples consumed, and what makes that number mean the same thing later."""
        identity: dict[str, Any] = {}
        if self.plan is not None and self._table is not None:
            identity = {**self.plan.identity(), "shards": self._table.shard_lines}
        return {"samples_consumed": self.progress.samples_consumed, **identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken.

        Raises:
            UserError: if data, seed, global batch or block size are not what they were.
        """
        self._restored = dict(state)
        self._resume()

    def epochs(self) -> dict[str, float]:
        """Say how many epochs of the data, or of each source of a mixture, are done."""
        if self.plan is None or self._sequence is None:
            return {}
        done = self._sequence.epochs(self._next_batch())
        if not self.plan.sources:
            return {"data/epochs": done[0]}
        names = (f"data/{source.name}/epochs" for source in self.plan.sources)
        return dict(zip(names, done, strict=True))

    @property
    def table(self) -> PairTable:
        """The table the position is in.

        Raises:
            RuntimeError: before ``begin``.
        """
        if self._table is None:
            raise RuntimeError("the position has not begun")
        return self._table

    def upcoming_shards(self) -> Iterator[str]:
        """Name the shards needed from the next batch on, in order, without end."""
        shards = self.table.shards
        assert self._sequence is not None  # it begins with the table
        return (shards[number] for number in self._sequence.upcoming_shards(self._next_batch()))

    def _next_batch(self) -> int:
        assert self.plan is not None  # the callers have checked it
        return self.progress.samples_consumed // self.plan.global_batch_size

    def _resume(self) -> None:
        """Take over a restored position once the plan it belongs to exists."""
        if self._restored is None or self.plan is None or self._table is None:
            return
        self.progress.samples_consumed = position_to_resume_at(
            self.plan,
            self._table.shard_lines,
            self._restored,
            accept_changed_data=self.accept_changed_data,
        )
        self._restored = None
