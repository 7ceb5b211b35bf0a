"""The samples of a global batch, and the share of each rank.

Positions run on without end, epoch after epoch. Global batch b of an epoch holds the positions
[b * G, (b + 1) * G) of its order; rank r of R takes the r-th of R equal slices:

    positions   0 1 2 3 4 5 6 7 | 8 9 ...            G = 8
    2 ranks     r0-----  r1----- | r0--
    4 ranks     r0- r1- r2- r3-  | r0- ...

So the batches depend on neither ranks nor loader processes, every rank has equally many, and one
integer, the samples consumed, says where a run stands. The tail of an epoch that does not fill a
global batch is left out; another order leaves out other samples in the next epoch. In a mixture of
sources positions go through all of them at once, and no tail is left out.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, repeat

from dist_siglip.data.order.sequence import (
    ROUND,
    Draw,
    MixtureSequence,
    SingleSequence,
    Source,
    StreamPosition,
    apportion,
    draw_one,
)
from dist_siglip.errors import UserError

BLOCK_SHARDS = 16
# Of SigLIP 2's NaFlex training, each as likely: arXiv:2502.14786, section 2.4.2.
SEQUENCE_LENGTHS = (128, 256, 576, 784, 1024)


@dataclass(frozen=True)
class SequenceLengths:
    """How many patches the pictures of a batch have at most, batch by batch (NaFlex).

    Args:
        lengths: to draw from, >= 1.
        weights: of the lengths, only their ratios matter; None draws all alike.

    Raises:
        UserError: if there is no length, one is below 1 or listed twice, or weights are not one
            each, finite and >= 0 with one above 0.

    Example:
        >>> lengths = SequenceLengths((128, 256), (1, 0))
        >>> [lengths.of_batch(0, batch) for batch in range(3)]
        [128, 128, 128]
    """

    lengths: tuple[int, ...] = SEQUENCE_LENGTHS
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        listed, weights = self.lengths, self.weights
        if not listed or min(listed) < 1 or len(set(listed)) < len(listed):
            raise UserError(
                f"sequence_lengths ({list(listed)}) must be different numbers of patches, each at "
                "least 1"
            )
        if weights is None:
            return
        are_numbers = all(0 <= each < math.inf for each in weights)
        if len(weights) != len(listed) or not are_numbers or not any(weights):
            raise UserError(
                f"length_weights ({list(weights)}) must be a number >= 0 for each of "
                f"sequence_lengths ({list(listed)}), one of them above 0; null draws all alike"
            )

    @classmethod
    def of(
        cls, asked: tuple[Sequence[int] | None, Sequence[float] | None], *, is_flexible: bool
    ) -> "SequenceLengths | None":
        """Return lengths as they are asked for, None for an image tower of pictures of one size.

        Args:
            asked: lengths and weights; None leaves them as by default.
            is_flexible: whether pictures may have any shape (NaFlex).

        Raises:
            UserError: if they are asked for where there is nothing to draw, or out of range.
        """
        lengths, weights = asked
        if is_flexible:
            return cls(
                SEQUENCE_LENGTHS if lengths is None else tuple(lengths),
                None if weights is None else tuple(weights),
            )
        for name, value in (("sequence_lengths", lengths), ("length_weights", weights)):
            if value is not None:
                raise UserError(
                    f"{name} ({list(value)}) are of pictures of any shape (NaFlex), and the image "
                    "tower sees one size; set model.num_patches, or leave them out"
                )
        return None

    def of_batch(self, seed: int, batch: int) -> int:
        """Return the length of global batch number ``batch``; the same on every rank and resume."""
        sums = list(accumulate(self.weights or (1.0,) * len(self.lengths)))
        at = draw_one(2**53, seed, batch, Draw.LENGTH) / 2**53 * sums[-1]
        return next(length for length, end in zip(self.lengths, sums, strict=True) if at < end)

    def __str__(self) -> str:
        weights = self.weights or (1,) * len(self.lengths)
        pairs = zip(self.lengths, weights, strict=True)
        return ", ".join(f"{length} x {weight:g}" for length, weight in pairs)


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
        sources: the sources of a mixture, which share out ``counts`` in order; empty for a single
            source.
        lengths: most patches of the pictures of each batch; None leaves that to the model.

    Raises:
        UserError: if there are fewer samples than one global batch needs, of all sources or of
            one.
    """

    counts: tuple[int, ...]
    fingerprint: str
    seed: int
    global_batch_size: int
    block_shards: int
    sources: tuple[Source, ...] = ()
    lengths: SequenceLengths | None = None

    def __post_init__(self) -> None:
        if self.global_batch_size > self.num_samples:
            raise UserError(
                f"global_batch_size ({self.global_batch_size}) must be at most the number of "
                f"training samples ({self.num_samples}); use a smaller batch or more shards"
            )
        if self.sources and sum((source.counts for source in self.sources), ()) != self.counts:
            raise ValueError("the sources of a mixture must share out the counts of all shards")
        for source, share in zip(self.sources, self._shares(), strict=True):
            if source.num_samples < share * self.global_batch_size:
                raise UserError(
                    f"source {source.name!r} has {source.num_samples} samples but is to give "
                    f"{share * self.global_batch_size:.1f} to every global batch of "
                    f"{self.global_batch_size}: a batch would hold pairs twice; lower its weight "
                    "or the batch"
                )

    @cached_property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return sum(self.counts)

    @property
    def batches_per_epoch(self) -> int:
        """Full global batches in as many samples as the data set has."""
        return self.num_samples // self.global_batch_size

    def sequence(self) -> SingleSequence | MixtureSequence:
        """Return what computes the positions of any batch."""
        if self.sources:
            return MixtureSequence(
                self.sources,
                seed=self.seed,
                global_batch_size=self.global_batch_size,
                block_shards=self.block_shards,
            )
        return SingleSequence(
            self.counts,
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            block_shards=self.block_shards,
        )

    def describe(self, world_size: int, progress: Progress) -> str:
        """State the batch arithmetic in one line, for the log."""
        local = self.global_batch_size // world_size
        if self.sources:
            shares = zip(self.sources, self._shares(), strict=True)
            listed = (f"{100 * share:.3g} % {s.name} ({s.num_samples})" for s, share in shares)
            epochs = f"a mixture of {', '.join(listed)}"
        else:
            left_out = self.num_samples % self.global_batch_size
            epochs = f"{self.batches_per_epoch} batches an epoch ({left_out} pairs left out)"
        return (
            f"training on {self.num_samples} pairs of {len(self.counts)} shards: global batch "
            f"{self.global_batch_size} = {world_size} ranks x {local}, {epochs}, from sample "
            f"{progress.samples_consumed} on"
        )

    def identity(self) -> dict[str, int | str]:
        """Everything the sequence depends on, as plain values for a checkpoint."""
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "block_shards": self.block_shards,
            "num_samples": self.num_samples,
            "fingerprint": self.fingerprint,
            "sources": ", ".join(f"{s.name} x {s.weight:g}" for s in self.sources),
            **({} if self.lengths is None else {"sequence_lengths": str(self.lengths)}),
        }

    def _shares(self) -> list[float]:
        """Share of each source of a mixture."""
        if not self.sources:
            return []
        quotas = apportion([source.weight for source in self.sources], ROUND)
        return [quota / ROUND for quota in quotas.tolist()]


class GlobalBatchSampler:
    """Endless batch sampler of one rank; each iteration starts where ``progress`` stands.

    Made for ``DataLoader(batch_sampler=...)``. It reads ``progress`` and never moves it: loaders
    run ahead of training, so only the training loop knows what was consumed. Starting costs one
    block of shards, however far the run is and however large the data.

    Args:
        plan: the sequence of global batches.
        rank: of this process.
        world_size: ranks; must divide the global batch.
        progress: where to start.
        repeat: batches, the first of the run, that come in turns; None takes all.

    Raises:
        UserError: if the ranks do not divide the global batch.
    """

    def __init__(
        self,
        plan: BatchPlan,
        *,
        rank: int,
        world_size: int,
        progress: Progress,
        repeat: int | None = None,
    ) -> None:
        check_divisible(plan.global_batch_size, world_size)
        self._plan = plan
        self._rank = rank
        self.local_batch_size = plan.global_batch_size // world_size
        self._progress = progress
        self._repeat = repeat

    def __iter__(self) -> Iterator[list[StreamPosition]]:
        sequence = self._plan.sequence()
        batch = self._progress.samples_consumed // self._plan.global_batch_size
        first = self._rank * self.local_batch_size
        while True:
            number = batch % self._repeat if self._repeat else batch
            positions = sequence.positions(number, first, first + self.local_batch_size)
            if self._plan.lengths is not None:
                length = self._plan.lengths.of_batch(self._plan.seed, number)
                positions = [at._replace(num_patches=length) for at in positions]
            yield positions
            batch += 1

    def batch_sizes(self) -> Iterator[int]:
        """Yield the rows of each batch, without end."""
        return repeat(self.local_batch_size)


class EvaluationBatchSampler:
    """Every sample once, in data order, split into equally many batches on every rank.

    Rank r takes the r-th contiguous part of ``ceil(samples / ranks)`` positions. Those past the end
    repeat the last sample and are marked as padding, so that no rank waits for another.

    Args:
        num_samples: >= 1.
        rank: of this process.
        world_size: ranks.
        local_batch_size: pairs of a batch on each rank; the last batch may be smaller.

    Example:
        >>> sampler = EvaluationBatchSampler(5, rank=1, world_size=2, local_batch_size=2)
        >>> [[(at.sample_id, at.is_padding) for at in batch] for batch in sampler]
        [[(3, False), (4, False)], [(4, True)]]
    """

    def __init__(
        self, num_samples: int, *, rank: int, world_size: int, local_batch_size: int
    ) -> None:
        self._num_samples = num_samples
        self.local_batch_size = local_batch_size
        self._length = -(-num_samples // world_size)
        self._first = rank * self._length

    def __len__(self) -> int:
        return -(-self._length // self.local_batch_size)

    def __iter__(self) -> Iterator[list[StreamPosition]]:
        start = self._first
        for size in self.batch_sizes():
            yield [self._position(position) for position in range(start, start + size)]
            start += size

    def batch_sizes(self) -> Iterator[int]:
        """Yield the rows of each batch."""
        for start in range(0, self._length, self.local_batch_size):
            yield min(self.local_batch_size, self._length - start)

    def _position(self, position: int) -> StreamPosition:
        last = self._num_samples - 1
        return StreamPosition(0, position, min(position, last), is_padding=position > last)


def check_divisible(global_batch_size: int, world_size: int) -> None:
    """Refuse a global batch that the ranks cannot share equally."""
    rest = global_batch_size % world_size
    if rest:
        below, above = global_batch_size - rest, global_batch_size - rest + world_size
        choice = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"global_batch_size ({global_batch_size}) must be divisible by world_size "
            f"({world_size}); use {choice}"
        )
