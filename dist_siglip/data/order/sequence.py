"""The endless sequence of samples: epochs of one source, or a mixture of several.

An epoch is a pure function of (seed, epoch, samples per shard, block size): shuffle the shards, cut
them into blocks, shuffle the samples inside each block. Only one block of shards is read at a time.
Every block draws from a Philox stream of its own, so the middle of an epoch of a billion samples
costs one block.

A mixture cuts positions into rounds of 65,536. A round holds a fixed number of draws of each
source, in proportion to the weights, in an order shuffled by (seed, round). So the draws of a
source before any position are known without walking there, shares are exact to 1/65,536 in every
round, and every source goes through its own epochs, leaving out no sample.
"""

import heapq
from collections.abc import Iterator, Sequence
from enum import IntEnum, unique
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUND = 1 << 16
# Keeps these draws apart from those of ``order``, which count sources and blocks there.
_STREAM = 1 << 63


class Mixture:
    """Which source every position of an endless stream draws from.

    Args:
        seed: >= 0.
        weights: > 0, one of each source; only their ratios matter.

    Example:
        >>> mixture = Mixture(0, [3, 1])
        >>> mixture.draws_before(2 * ROUND).tolist()
        [98304, 32768]
        >>> np.bincount(mixture.sources(0, 4 * ROUND)).tolist()
        [196608, 65536]
    """

    def __init__(self, seed: int, weights: Sequence[float]) -> None:
        self._seed = seed
        self.quotas = apportion(weights, ROUND)
        self._round = -1
        self._arrangement = np.zeros(0, dtype=np.int64)

    def sources(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the source of each position from ``start`` to ``stop - 1``, as int64."""
        parts = [np.zeros(0, dtype=np.int64)]
        while start < stop:
            number, place = divmod(start, ROUND)
            part = self._arranged(number)[place : place + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def draws_before(self, position: int) -> NDArray[np.int64]:
        """Return how often each source was drawn at positions below ``position``, as int64."""
        number, place = divmod(position, ROUND)
        rest = np.bincount(self._arranged(number)[:place], minlength=len(self.quotas))
        return number * self.quotas + rest

    def _arranged(self, number: int) -> NDArray[np.int64]:
        if number != self._round:
            key = np.array([self._seed, number], dtype=np.uint64)
            counter = np.array([0, 0, _STREAM, 0], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
            sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
            self._round, self._arrangement = number, generator.permutation(sources)
        return self._arrangement


def apportion(weights: Sequence[float], seats: int) -> NDArray[np.int64]:
    """Share ``seats`` in proportion to weights: largest remainders, and nobody gets none.

    Args:
        weights: > 0.
        seats: at least one for each weight.

    Example:
        >>> apportion([1.0, 1.0, 1.0], 8).tolist()
        [3, 3, 2]
        >>> apportion([1000.0, 1e-9], 8).tolist()
        [7, 1]
    """
    wanted = np.asarray(weights, dtype=np.float64)
    wanted = wanted / wanted.sum() * seats
    shares = np.maximum(np.floor(wanted), 1).astype(np.int64)
    while shares.sum() < seats:
        shares[np.argmax(wanted - shares)] += 1
    while shares.sum() > seats:
        shares[np.argmax(shares - wanted + np.where(shares > 1, seats, 0))] -= 1
    return shares


class EpochOrder:
    """The order of one epoch of one source, computed block by block when asked for.

    Sample ids number the samples shard after shard: shard s holds ids
    ``sum(counts[:s])`` to ``sum(counts[:s + 1]) - 1``.

    Args:
        seed: >= 0; runs with equal seeds see equal orders.
        epoch: >= 0.
        counts: samples of each shard.
        block_shards: >= 1; shards shuffled together. 1 keeps shards apart; the number of
            shards shuffles everything.
        source: number of the source in a mixture; each has orders of its own.

    Example:
        >>> order = EpochOrder(0, 0, [2, 3, 4], block_shards=2)
        >>> order.ids(0, 9).tolist() == [*order.ids(0, 5), *order.ids(5, 9)]
        True
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        counts: Sequence[int] | NDArray[np.int64],
        block_shards: int,
        source: int = 0,
    ) -> None:
        self._key = np.array([seed, epoch], dtype=np.uint64)
        self._source = source
        sizes = np.asarray(counts, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._shards = self._generator(0).permutation(len(sizes))
        self._block_shards = block_shards
        ends = np.cumsum(sizes[self._shards])
        last = np.arange(block_shards, len(sizes) + block_shards, block_shards) - 1
        # Position after the last sample of each block.
        self._block_ends = ends[np.minimum(last, len(sizes) - 1)] if len(sizes) else ends
        self._blocks: dict[int, NDArray[np.int64]] = {}

    def ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the sample ids at positions ``start`` to ``stop - 1``, as int64."""
        parts = [np.zeros(0, dtype=np.int64)]
        block = self._block_at(start)
        while start < stop:
            first = int(self._block_ends[block - 1]) if block else 0
            end = min(stop, int(self._block_ends[block]))
            parts.append(self._block(block)[start - first : end - first])
            start, block = max(start, end), block + 1
        return np.concatenate(parts)

    def shards(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """List the blocks from position ``start`` on: where each begins, and its shards."""
        for block in range(self._block_at(start), len(self._block_ends)):
            first = int(self._block_ends[block - 1]) if block else 0
            yield first, self._shards_of(block).tolist()

    def _block_at(self, position: int) -> int:
        return int(np.searchsorted(self._block_ends, position, side="right"))

    def _block(self, block: int) -> NDArray[np.int64]:
        if block not in self._blocks:
            if len(self._blocks) > 1:  # a batch may reach from one block into the next
                del self._blocks[min(self._blocks)]
            ids = np.concatenate(
                [np.arange(self._starts[s], self._starts[s + 1]) for s in self._shards_of(block)]
            )
            self._blocks[block] = self._generator(block + 1).permutation(ids)
        return self._blocks[block]

    def _shards_of(self, block: int) -> NDArray[np.int64]:
        return self._shards[block * self._block_shards : (block + 1) * self._block_shards]

    def _generator(self, stream: int) -> np.random.Generator:
        counter = np.array([0, 0, self._source, stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=self._key, counter=counter))


def epoch_order(
    seed: int, epoch: int, counts: Sequence[int], block_shards: int
) -> NDArray[np.int64]:
    """Return the whole order of one epoch; see ``EpochOrder``.

    Returns:
        (samples,) int64, a permutation of all ids. Equal arguments give equal orders on every
        machine.

    Example:
        >>> sorted(epoch_order(0, 1, [2, 3], block_shards=1).tolist())
        [0, 1, 2, 3, 4]
    """
    return EpochOrder(seed, epoch, counts, block_shards).ids(0, sum(counts))


class StreamPosition(NamedTuple):
    """One place in the stream of samples; everything random about a sample is a function of it.

    Attributes:
        epoch: which pass over the data.
        position: place within the order of that epoch.
        sample_id: the sample that stands there.
        is_padding: whether it only fills up the batches of an evaluation.
        source: number of the source of a mixture it was drawn from; epoch and position count
            within that source.
        num_patches: budget of patches that the pictures of its batch have; 0: that of the model.
    """

    epoch: int
    position: int
    sample_id: int
    is_padding: bool = False
    source: int = 0
    num_patches: int = 0

    def key(self, seed: int) -> tuple[int, ...]:
        """Return the key of every random draw about this position: (seed, epoch, position, source).

        Example:
            >>> StreamPosition(1, 5, 42).key(0)
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
        global_batch_size: positions of a batch.
        block_shards: shards shuffled together.
    """

    def __init__(
        self, counts: Sequence[int], *, seed: int, global_batch_size: int, block_shards: int
    ) -> None:
        self._orders = _Orders(seed, [counts], block_shards)
        self._global_batch_size = global_batch_size
        self._batches_per_epoch = sum(counts) // global_batch_size

    def positions(self, batch: int, first: int, stop: int) -> list[StreamPosition]:
        """Return rows ``first`` to ``stop - 1`` of global batch number ``batch``."""
        epoch, number = divmod(batch, self._batches_per_epoch)
        start = number * self._global_batch_size
        ids = self._orders.of(0, epoch).ids(start + first, start + stop).tolist()
        return [
            StreamPosition(epoch, start + first + row, sample) for row, sample in enumerate(ids)
        ]

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
        global_batch_size: positions of a batch.
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

    def positions(self, batch: int, first: int, stop: int) -> list[StreamPosition]:
        """Return rows ``first`` to ``stop - 1`` of global batch number ``batch``."""
        start = batch * self._global_batch_size + first
        sources = self._mixture.sources(start, start + stop - first)
        draws = self._mixture.draws_before(start).tolist()
        rows: list[StreamPosition | None] = [None] * len(sources)
        for source in np.unique(sources).tolist():
            places = np.flatnonzero(sources == source).tolist()
            drawn = self._drawn(source, draws[source], len(places))
            for row, position in zip(places, drawn, strict=True):
                rows[row] = position
        return [position for position in rows if position is not None]

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

    def _drawn(self, source: int, draw: int, count: int) -> Iterator[StreamPosition]:
        """Yield draws number ``draw`` to ``draw + count - 1`` of a source."""
        size = int(self._sizes[source])
        while count:
            epoch, place = divmod(draw, size)
            stop = min(place + count, size)
            ids = self._orders.of(source, epoch).ids(place, stop).tolist()
            for position, sample in enumerate(ids, start=place):
                yield StreamPosition(
                    epoch, position, self._first_ids[source] + sample, source=source
                )
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


@unique
class Draw(IntEnum):
    """What a number is drawn for at a place in the stream: the end of its key.

    Draws of one purpose have nothing to do with those of another, nor with those of the attempts at
    a substitute, whose keys end in their number.
    """

    CAPTION = 1 << 20
    REGION = CAPTION + 1
    DEVICE = CAPTION + 2
    NEGATIVE = CAPTION + 3
    AUGMENTATION = 1 << 21
    IS_SYNTHETIC = AUGMENTATION + 1
    SYNTHETIC = AUGMENTATION + 2
    FIELD = 1 << 22
    LENGTH = 1 << 23


def draw_one(num_choices: int, *key: int) -> int:
    """Choose one of several, as a function of the key.

    Args:
        num_choices: >= 1.
        key: integers >= 0.

    Returns:
        A number in [0, num_choices).

    Example:
        >>> draw_one(1000, 0, 0, 7, 1) == draw_one(1000, 0, 0, 7, 1)
        True
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] % np.uint64(num_choices))
