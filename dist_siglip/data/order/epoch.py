"""In which order does an epoch visit the samples?

A pure function of (seed, epoch, samples per shard, block size): shuffle the shards, cut them into
blocks, shuffle the samples inside each block. Only one block of shards is being read at a time, so
disks and caches see locality, and the block is exactly what a shuffle buffer only approximates.

Every block draws from a stream of its own (Philox counts; a block starts at its own count), so the
middle of an epoch of a billion samples costs one block, not the billion.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


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
