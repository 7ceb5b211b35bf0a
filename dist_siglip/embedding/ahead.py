"""Which remote shards should be here before a rank comes to them?"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.remote import is_remote
from dist_siglip.data.remote.prefetch import Prefetcher
from dist_siglip.distributed import World
from dist_siglip.embedding.layout import Layout
from dist_siglip.embedding.part import Part

_LOGGER = logging.getLogger(__name__)


@contextmanager
def fetching_ahead(
    table: PairTable,
    parts: Sequence[Part],
    layout: Layout,
    world: World,
    current: Callable[[], int],
) -> Iterator[None]:
    """Fetch remote shards while the block runs; the first rank of a node does it for all of them.

    Args:
        table: the data set.
        parts: all of the data set.
        layout: knows which of them are finished.
        world: of this process.
        current: number of the part this rank is at; the others are thought to be as far.
    """
    cache = table.cache
    is_needed = world.local_rank == 0 and any(is_remote(shard) for shard in table.shards)
    if cache is None or not is_needed:
        yield
        return
    _LOGGER.info("remote shards: %s", cache.describe())
    ranks = range(world.rank, world.rank + world.local_world_size)  # of this node
    of_node = [part for part in parts if part.number % world.world_size in ranks]
    wanted = [part.number for part in of_node if layout.num_rows(part) is None]
    prefetcher = Prefetcher(
        cache, lambda: [table.shards[number] for number in wanted if number >= current()]
    )
    prefetcher.start()
    try:
        yield
    finally:
        prefetcher.stop()
