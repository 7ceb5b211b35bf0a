"""The exchange without hops: gather every shard, visit, reduce-scatter the accumulators.

Two collectives instead of a chain of hops, for features and accumulators small enough that
every rank can hold those of all ranks.
"""

from collections.abc import Sequence

from torch.distributed import ProcessGroup

from dist_siglip.distributed.collectives import gather_padded
from dist_siglip.distributed.combine import Combine, reduce_scatter
from dist_siglip.distributed.ring import AccumulatorSpec, Shard, Visitor


def visit_gathered(
    columns: Shard,
    visit: Visitor,
    specs: Sequence[AccumulatorSpec],
    combine: Combine,
    row_counts: Sequence[int],
    transfer: ProcessGroup,
) -> Shard:
    """Gather, visit every shard, and return this rank's finished accumulators.

    Args:
        columns: this rank's shard, contiguous tensors.
        visit: called once per shard, its own first; overwrites the contributions it is given.
        specs: the accumulators.
        combine: how contributions meet.
        row_counts: rows of every rank's shard.
        transfer: process group of its own for these transfers.
    """
    rank, world_size, longest = transfer.rank(), len(row_counts), max(row_counts)
    gathered = [gather_padded(column, longest, transfer) for column in columns]
    collected = [
        # Zeros: the padding rows of short shards are reduced too.
        columns[0].new_zeros((world_size, longest, *spec.row_shape), dtype=spec.dtype)
        for spec in specs
    ]
    for step in range(world_size):
        owner = (rank - step) % world_size
        rows = row_counts[owner]
        visit(
            owner,
            tuple(everyone[owner, :rows] for everyone in gathered),
            tuple(everyone[owner, :rows] for everyone in collected),
        )
    return tuple(
        reduce_scatter(everyone, combine, transfer)[: row_counts[rank]] for everyone in collected
    )
