"""Which slots make global batch b?

Two answers with one face. A single source goes epoch by epoch: the tail of an epoch that does not
fill a batch is left out, so that no batch straddles two epochs and none holds a sample twice. A
mixture has no common epoch: its sources go round at their own pace, and nothing is left out.
Either is a pure function of its arguments; what is kept is only what was computed last.

What is one place in the stream of samples?
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dist_siglip.data.order.epoch import EpochOrder
from dist_siglip.data.order.mixture import ROUND, Mixture


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


class Source(NamedTuple):
    """One source of training data, as plain numbers.

    Attributes:
        name: of its metrics and log lines.
        counts: samples of each of its shards.
        weight: share of the draws, relative to the other sources.
    """

    name: str
    counts: tuple[int, ...]
    weight: float

    @property
    def num_samples(self) -> int:
        """Samples of the source."""
        return sum(self.counts)


class SingleSequence:
    """Batches of one source, epoch after epoch.

    Args:
        counts: samples of each shard.
        seed: of the order.
        global_batch_size: slots of a batch.
        block_shards: shards shuffled together.
    """

    def __init__(
        self, counts: Sequence[int], *, seed: int, global_batch_size: int, block_shards: int
    ) -> None:
        self._orders = _Orders(seed, [counts], block_shards)
        self._global_batch_size = global_batch_size
        self._batches_per_epoch = sum(counts) // global_batch_size

    def slots(self, batch: int, first: int, stop: int) -> list[Slot]:
        """Return rows ``first`` to ``stop - 1`` of global batch number ``batch``."""
        epoch, number = divmod(batch, self._batches_per_epoch)
        start = number * self._global_batch_size
        ids = self._orders.of(0, epoch).ids(start + first, start + stop).tolist()
        return [Slot(epoch, start + first + row, sample) for row, sample in enumerate(ids)]

    def epochs(self, batch: int) -> list[float]:
        """Say how many epochs of each source are done before a batch."""
        return [batch / self._batches_per_epoch]

    def upcoming_shards(self, batch: int) -> Iterator[int]:
        """Name the shards needed from a batch on, in order, without end."""
        epoch, number = divmod(batch, self._batches_per_epoch)
        start = number * self._global_batch_size
        while True:
            for _, shards in EpochOrder(*self._orders.key(0, epoch)).shards(start):
                yield from shards
            epoch, start = epoch + 1, 0


class MixtureSequence:
    """Batches that draw from several sources by weight.

    Sample ids and shards run on from source to source.

    Args:
        sources: at least one.
        seed: of the order.
        global_batch_size: slots of a batch.
        block_shards: shards shuffled together, within each source.
    """

    def __init__(
        self, sources: Sequence[Source], *, seed: int, global_batch_size: int, block_shards: int
    ) -> None:
        self._orders = _Orders(seed, [source.counts for source in sources], block_shards)
        self._mixture = Mixture(seed, [source.weight for source in sources])
        self._global_batch_size = global_batch_size
        sizes = [source.num_samples for source in sources]
        self._sizes = np.array(sizes, dtype=np.int64)
        self._first_ids = [0, *np.cumsum(sizes).tolist()]
        self._first_shards = [0, *np.cumsum([len(s.counts) for s in sources]).tolist()]

    def slots(self, batch: int, first: int, stop: int) -> list[Slot]:
        """Return rows ``first`` to ``stop - 1`` of global batch number ``batch``."""
        start = batch * self._global_batch_size + first
        sources = self._mixture.sources(start, start + stop - first)
        draws = self._mixture.draws_before(start).tolist()
        rows: list[Slot | None] = [None] * len(sources)
        for source in np.unique(sources).tolist():
            places = np.flatnonzero(sources == source).tolist()
            drawn = self._drawn(source, draws[source], len(places))
            for row, slot in zip(places, drawn, strict=True):
                rows[row] = slot
        return [slot for slot in rows if slot is not None]

    def epochs(self, batch: int) -> list[float]:
        """Say how many epochs of each source are done before a batch."""
        draws = self._mixture.draws_before(batch * self._global_batch_size)
        return (draws / self._sizes).tolist()

    def upcoming_shards(self, batch: int) -> Iterator[int]:
        """Name the shards needed from a batch on, in order, without end."""
        draws = self._mixture.draws_before(batch * self._global_batch_size).tolist()
        streams = [self._blocks(source, start) for source, start in enumerate(draws)]
        for _, shards in heapq.merge(*streams, key=lambda block: block[0]):
            yield from shards

    def _drawn(self, source: int, draw: int, count: int) -> Iterator[Slot]:
        """Yield draws number ``draw`` to ``draw + count - 1`` of a source."""
        size = int(self._sizes[source])
        while count:
            epoch, place = divmod(draw, size)
            stop = min(place + count, size)
            ids = self._orders.of(source, epoch).ids(place, stop).tolist()
            for position, sample in enumerate(ids, start=place):
                yield Slot(epoch, position, self._first_ids[source] + sample, source=source)
            draw, count = draw + stop - place, count - (stop - place)

    def _blocks(self, source: int, draw: int) -> Iterator[tuple[float, list[int]]]:
        """Yield the blocks of a source from a draw on: about where they begin, their shards."""
        size, first_shard = int(self._sizes[source]), self._first_shards[source]
        pace = ROUND / int(self._mixture.quotas[source])
        epoch, place = divmod(draw, size)
        while True:
            for begin, shards in EpochOrder(*self._orders.key(source, epoch)).shards(place):
                yield (epoch * size + begin) * pace, [first_shard + shard for shard in shards]
            epoch, place = epoch + 1, 0


class _Orders:
    """The epoch orders used last, of every source."""

    def __init__(self, seed: int, counts: Sequence[Sequence[int]], block_shards: int) -> None:
        self._seed = seed
        self._counts = [np.asarray(of_source, dtype=np.int64) for of_source in counts]
        self._block_shards = block_shards
        self._kept: dict[int, tuple[int, EpochOrder]] = {}

    def key(self, source: int, epoch: int) -> tuple[int, int, np.ndarray, int, int]:
        """Return the arguments of an ``EpochOrder``."""
        return self._seed, epoch, self._counts[source], self._block_shards, source

    def of(self, source: int, epoch: int) -> EpochOrder:
        """Return the order of an epoch of a source."""
        kept = self._kept.get(source)
        if kept is None or kept[0] != epoch:
            kept = epoch, EpochOrder(*self.key(source, epoch))
            self._kept[source] = kept
        return kept[1]
