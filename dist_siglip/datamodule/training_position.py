"""Where in the endless sequence of batches does training stand, and what does it take to go on?

One integer counts the batches that were trained on. Loaders run ahead of training, and Lightning's
own epoch counter has moved on by the time a run stops early, so neither can say where training
stands; a small callback (``position_counter``), first in line so that every checkpoint sees its
count, does.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.order.position import BatchPlan, Progress
from dist_siglip.data.order.sequence import MixtureSequence, SingleSequence
from dist_siglip.data.resume import position_to_resume_at


class TrainingPosition:
    """The position of a run in its training data, as a checkpoint keeps it.

    A state may be restored before the plan it belongs to exists.

    Args:
        accept_changed_data: resume although the shards changed.

    Attributes:
        progress: samples consumed.
        plan: the sequence of batches, once it has begun.
    """

    def __init__(self, *, accept_changed_data: bool) -> None:
        self.progress = Progress()
        self.plan: BatchPlan | None = None
        self._accept_changed_data = accept_changed_data
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
            accept_changed_data=self._accept_changed_data,
        )
        self._restored = None
