"""The pairs that calibration looks at: the first of the order of epoch 0.

They are drawn from a block of shards, the same whatever the number of ranks and loader processes.
"""

from collections.abc import Sequence
from typing import Protocol

from torch.utils.data import DataLoader

from dist_siglip.data.order.sequence import StreamPosition, epoch_order
from dist_siglip.data.samples.batch import PairCollator, PairSample
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.loader import prepare_worker
from dist_siglip.data.samples.transforms import Preprocessing
from dist_siglip.distributed import World
from dist_siglip.errors import UserError

_LOCAL_BATCH_SIZE = 64


def subset_positions(
    counts: Sequence[int],
    num_pairs: int,
    *,
    seed: int,
    block_shards: int,
    rank: int,
    world_size: int,
) -> list[list[StreamPosition]]:
    """Share the first ``num_pairs`` pairs of epoch 0 among the ranks, in small batches.

    Args:
        counts: samples of each shard.
        num_pairs: over all ranks; all there are if there are fewer.
        seed: of the order.
        block_shards: shards shuffled together.
        rank: of this process; it takes every ``world_size``-th pair.
        world_size: ranks.

    Raises:
        UserError: if num_pairs < 2, or a rank would have no pair.

    Example:
        >>> positions = subset_positions([4, 4], 5, seed=0, block_shards=2, rank=1, world_size=2)
        >>> [[at.position for at in batch] for batch in positions]
        [[1, 3]]
    """
    if num_pairs < 2:
        raise UserError(f"pairs to look at ({num_pairs}) must be at least 2, better 4096")
    chosen = epoch_order(seed, 0, counts, block_shards)[:num_pairs].tolist()
    if len(chosen) < world_size:
        raise UserError(
            f"pairs to look at ({len(chosen)}) must be at least one for each of {world_size} ranks"
        )
    positions = [StreamPosition(0, position, sample) for position, sample in enumerate(chosen)]
    mine = positions[rank::world_size]
    return [mine[i : i + _LOCAL_BATCH_SIZE] for i in range(0, len(mine), _LOCAL_BATCH_SIZE)]


class LoaderSettings(Protocol):
    """What a data module knows about order and loading."""

    seed: int
    block_shards: int
    workers_per_rank: int
    inputs: Preprocessing | None


def subset_loader(
    dataset: PairDataset, num_pairs: int, settings: LoaderSettings, world: World
) -> DataLoader[PairSample]:
    """Load this rank's share of the subset, ``ImageTextBatch`` by ``ImageTextBatch``.

    Args:
        dataset: pairs by position.
        num_pairs: see ``subset_positions``.
        settings: of the data module; the loader processes end with the iteration.
        world: rank and number of ranks.

    Raises:
        UserError: as ``subset_positions``, or if ``inputs`` are missing.
    """
    if settings.inputs is None:
        raise UserError("inputs (null) must be the preprocessing of the model")
    positions = subset_positions(
        dataset.table.counts,
        num_pairs,
        seed=settings.seed,
        block_shards=settings.block_shards,
        rank=world.rank,
        world_size=world.world_size,
    )
    return DataLoader(
        dataset,
        batch_sampler=positions,
        collate_fn=PairCollator(settings.inputs.tokenizer),
        num_workers=settings.workers_per_rank,
        worker_init_fn=prepare_worker,
    )
