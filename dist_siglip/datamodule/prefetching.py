"""Does a run have remote shards to fetch ahead?"""

import logging

import numpy as np

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.remote import ShardCache, is_remote
from dist_siglip.data.remote.prefetch import Prefetcher, describe_tight_cache
from dist_siglip.datamodule.training_position import TrainingPosition

_LOGGER = logging.getLogger(__name__)


def start_prefetching(
    cache: ShardCache, position: TrainingPosition, running: Prefetcher | None
) -> Prefetcher | None:
    """Fetch the shards that training needs next, from where it stands.

    Args:
        cache: of the node; one process of a node fetches ahead for all.
        position: of the run.
        running: what was started before.

    Returns:
        The running prefetcher; None if every shard is local.
    """
    if running is not None:
        return running
    shards = position.table.shards
    if not any(is_remote(shard) for shard in shards):
        return None
    plan = position.plan
    tight = ""
    if plan is not None:
        tight = describe_tight_cache(cache, _remote_bytes(position.table), plan.block_shards)
    if tight:
        _LOGGER.warning("%s", tight)
    _LOGGER.info("remote shards: %s", cache.describe())
    prefetcher = Prefetcher(cache, position.upcoming_shards)
    prefetcher.start()
    return prefetcher


def _remote_bytes(table: PairTable) -> list[int]:
    """Say where the last picture of each remote shard ends: nearly its size."""
    ends = np.append(table.image_offsets + table.image_sizes, 0)
    found = []
    for number, shard in enumerate(table.shards):
        first, stop = int(table.starts[number]), int(table.starts[number + 1])
        if is_remote(shard) and stop > first:
            found.append(int(ends[first:stop].max()))
    return found
