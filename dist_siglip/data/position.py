"""Which samples make global batch b, and which of them are this rank's?

Positions run on without end, epoch after epoch. Global batch b of an epoch holds the positions
[b * G, (b + 1) * G) of its order; rank r of R takes the r-th of R equal slices:

    positions   0 1 2 3 4 5 6 7 | 8 9 ...            G = 8
    2 ranks     r0-----  r1----- | r0--
    4 ranks     r0- r1- r2- r3-  | r0- ...

So the batches depend on neither ranks nor loader processes, every rank has equally many, and one
integer, the samples consumed, says where a run stands. The tail of an epoch that does not fill a
global batch is left out; another order leaves out other samples in the next epoch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dist_siglip.data.order import epoch_order
from dist_siglip.errors import UserError

_REMEDY = "set it back, or start a new run in another folder"


class Slot(NamedTuple):
    """One place in the stream of samples; everything random about a sample is a function of it.

    Attributes:
        epoch: which pass over the data.
        position: place within the order of that epoch.
        sample_id: the sample that stands there.
        is_padding: whether it only fills up the batches of an evaluation.
        source: number of the source of a mixture it was drawn from; epoch and position count
            within that source.
    """

    epoch: int
    position: int
    sample_id: int
    is_padding: bool = False
    source: int = 0

    def key(self, seed: int) -> tuple[int, ...]:
        """Return the key of every random draw about this slot: (seed, epoch, position, source).

        Example:
            >>> Slot(1, 5, 42).key(0)
            (0, 1, 5, 0)
        """
        return (seed, self.epoch, self.position, self.source)


@dataclass
class Progress:
    """How far training has come: the one integer a checkpoint needs.

    Attributes:
        samples_consumed: positions of all finished global batches.
    """

    samples_consumed: int = 0


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The endless sequence of global batches over a data set.

    Args:
        counts: samples of each shard.
        fingerprint: hash that changes when the data changes.
        seed: >= 0, of the order.
        global_batch_size: pairs of a batch over all ranks.
        block_shards: shards shuffled together.

    Raises:
        UserError: if there are fewer samples than one global batch needs.
    """

    counts: tuple[int, ...]
    fingerprint: str
    seed: int
    global_batch_size: int
    block_shards: int

    def __post_init__(self) -> None:
        if self.global_batch_size > self.num_samples:
            raise UserError(
                f"global_batch_size ({self.global_batch_size}) must be at most the number of "
                f"training samples ({self.num_samples}); use a smaller batch or more shards"
            )

    @cached_property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return sum(self.counts)

    @property
    def batches_per_epoch(self) -> int:
        """Full global batches of one epoch."""
        return self.num_samples // self.global_batch_size

    def describe(self, world_size: int, progress: Progress) -> str:
        """State the batch arithmetic in one line, for the log."""
        local = self.global_batch_size // world_size
        return (
            f"training on {self.num_samples} pairs of {len(self.counts)} shards: global batch "
            f"{self.global_batch_size} = {world_size} ranks x {local}, {self.batches_per_epoch} "
            f"batches an epoch ({self.num_samples % self.global_batch_size} pairs left out), from "
            f"sample {progress.samples_consumed} on"
        )

    def identity(self) -> dict[str, int | str]:
        """Everything the sequence depends on, as plain values for a checkpoint."""
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "block_shards": self.block_shards,
            "num_samples": self.num_samples,
            "fingerprint": self.fingerprint,
        }

    def check_identity(self, saved: Mapping[str, int | str]) -> None:
        """Refuse to go on with another sequence than the one a checkpoint was written in.

        Raises:
            UserError: if a value differs; names it, the value then and the value now.
        """
        for name, now in self.identity().items():
            then = saved.get(name, "not recorded")
            if then != now:
                subject = "the training shards (fingerprint)" if name == "fingerprint" else name
                raise UserError(
                    f"cannot resume at the exact sample: {subject} was {then} when the checkpoint "
                    f"was written and is {now} now; {_REMEDY}"
                )


class GlobalBatchSampler:
    """Endless batch sampler of one rank; each iteration starts where ``progress`` stands.

    Made for ``DataLoader(batch_sampler=...)``. It reads ``progress`` and never moves it: loaders
    run ahead of training, so only the training loop knows what was consumed. Starting costs one
    permutation, however far the run is.

    Args:
        plan: the sequence of global batches.
        rank: of this process.
        world_size: ranks; must divide the global batch.
        progress: where to start.

    Raises:
        UserError: if the ranks do not divide the global batch.
    """

    def __init__(self, plan: BatchPlan, *, rank: int, world_size: int, progress: Progress) -> None:
        check_divisible(plan.global_batch_size, world_size)
        self._plan = plan
        self._rank = rank
        self._local_batch_size = plan.global_batch_size // world_size
        self._progress = progress

    def __iter__(self) -> Iterator[list[Slot]]:
        plan = self._plan
        done = self._progress.samples_consumed // plan.global_batch_size
        epoch, batch = divmod(done, plan.batches_per_epoch)
        while True:
            order = epoch_order(plan.seed, epoch, plan.counts, plan.block_shards)
            for number in range(batch, plan.batches_per_epoch):
                first = number * plan.global_batch_size + self._rank * self._local_batch_size
                ids = order[first : first + self._local_batch_size].tolist()
                yield [Slot(epoch, first + place, sample) for place, sample in enumerate(ids)]
            epoch, batch = epoch + 1, 0


class EvaluationBatchSampler:
    """Every sample once, in data order, split into equally many batches on every rank.

    Rank r takes the r-th contiguous part of ``ceil(samples / ranks)`` slots. Slots past the end
    repeat the last sample and are marked as padding, so that no rank waits for another.

    Args:
        num_samples: >= 1.
        rank: of this process.
        world_size: ranks.
        local_batch_size: pairs of a batch on each rank; the last batch may be smaller.

    Example:
        >>> sampler = EvaluationBatchSampler(5, rank=1, world_size=2, local_batch_size=2)
        >>> [[(slot.sample_id, slot.is_padding) for slot in batch] for batch in sampler]
        [[(3, False), (4, False)], [(4, True)]]
    """

    def __init__(
        self, num_samples: int, *, rank: int, world_size: int, local_batch_size: int
    ) -> None:
        self._num_samples = num_samples
        self._local_batch_size = local_batch_size
        self._length = -(-num_samples // world_size)
        self._first = rank * self._length

    def __len__(self) -> int:
        return -(-self._length // self._local_batch_size)

    def __iter__(self) -> Iterator[list[Slot]]:
        for start in range(0, self._length, self._local_batch_size):
            stop = min(start + self._local_batch_size, self._length)
            yield [self._slot(self._first + place) for place in range(start, stop)]

    def _slot(self, position: int) -> Slot:
        last = self._num_samples - 1
        return Slot(0, position, min(position, last), is_padding=position > last)


def check_divisible(global_batch_size: int, world_size: int) -> None:
    """Refuse a global batch that the ranks cannot share equally.

    Raises:
        UserError: naming the nearest sizes that would do.
    """
    rest = global_batch_size % world_size
    if rest:
        below, above = global_batch_size - rest, global_batch_size - rest + world_size
        choice = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"global_batch_size ({global_batch_size}) must be divisible by world_size "
            f"({world_size}); use {choice}"
        )
