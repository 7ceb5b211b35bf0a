"""In which order does an epoch visit the samples?

A pure function of (seed, epoch, samples per shard, block size): shuffle the shards, cut them into
blocks, shuffle the samples inside each block. Only one block of shards is being read at a time, so
disks and caches see locality, and the block is exactly what a shuffle buffer only approximates.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def epoch_order(
    seed: int, epoch: int, counts: Sequence[int], block_shards: int
) -> NDArray[np.int64]:
    """Return the order of the sample ids in one epoch.

    Sample ids number the samples shard after shard: shard s holds ids
    ``sum(counts[:s])`` to ``sum(counts[:s + 1]) - 1``.

    Args:
        seed: >= 0; runs with equal seeds see equal orders.
        epoch: >= 0.
        counts: samples of each shard.
        block_shards: >= 1; shards shuffled together. 1 keeps shards apart; the number of
            shards shuffles everything.

    Returns:
        (samples,) int64, a permutation of all ids. Equal arguments give equal orders on every
        machine (counter-based Philox generator, keyed by seed and epoch).

    Example:
        >>> epoch_order(0, 0, [2, 3], block_shards=2).tolist()
        [0, 3, 1, 2, 4]
        >>> sorted(epoch_order(0, 1, [2, 3], block_shards=1).tolist())
        [0, 1, 2, 3, 4]
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    shards = generator.permutation(len(counts))
    blocks = [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(shards), block_shards):
        block = shards[first : first + block_shards]
        ids = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in block])
        blocks.append(generator.permutation(ids))
    return np.concatenate(blocks)
