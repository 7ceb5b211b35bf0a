"""One trip of every shard around the ring, its accumulators travelling along.

With four ranks, the shard of rank 2 and its accumulator go 2 -> 3 -> 0 -> 1 and the accumulator
one hop further, home to 2:

    hop      rank 0    rank 1    rank 2    rank 3
    0        shard 0   shard 1   shard 2   shard 3
    1        shard 3   shard 0   shard 1   shard 2
    2        shard 2   shard 3   shard 0   shard 1
    3        shard 1   shard 2   shard 3   shard 0

A shard's next transfer is posted before its visit and waited for after it; the accumulator of
the shard, sent one hop ago, is waited for only when there is something to add. So transfers hide
behind the visit. Buffers are owned and reused: two shards and three accumulators, whatever the
number of ranks.

Bytes per rank: (W - 1) shards and W accumulators sent; nothing more in a backward pass.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

Shard = tuple[Tensor, ...]
Visitor = Callable[[int, Shard, Shard], None]


class AccumulatorSpec(NamedTuple):
    """One tensor that travels with a shard and collects what every rank adds to its rows.

    Attributes:
        row_shape: shape of one row; () for one number per row.
        dtype: dtype of the accumulator.
    """

    row_shape: tuple[int, ...]
    dtype: torch.dtype


# Tags keep the two streams of messages between the same two ranks apart on gloo; NCCL, which
# ignores tags, matches them by the order of posting, and that is the same on every rank.
_SHARD_TAG, _ACCUMULATOR_TAG = 1, 2


def circulate_ring(
    columns: Sequence[Tensor],
    visit: Visitor,
    specs: Sequence[AccumulatorSpec],
    add: Callable[[Tensor, Tensor], None],
    row_counts: Sequence[int],
    transfer: ProcessGroup,
) -> Shard:
    """Run the ring described in the module docstring; see ``exchange.circulate``.

    Args:
        columns: this rank's shard, contiguous tensors.
        visit: called once per shard; overwrites the contributions it is given.
        specs: the accumulators.
        add: ``add(mine, theirs)`` combines in place into ``mine``.
        row_counts: rows of every rank's shard.
        transfer: process group of its own for these transfers.

    Returns:
        The finished accumulators of this rank's rows.
    """
    rank, world_size = dist.get_rank(transfer), len(row_counts)
    longest = max(row_counts)
    neighbours = _Neighbours(transfer, rank, world_size)

    def own_buffers() -> Shard:
        return tuple(column.new_empty((longest, *column.shape[1:])) for column in columns)

    def own_accumulators() -> Shard:
        return tuple(
            columns[0].new_empty((longest, *spec.row_shape), dtype=spec.dtype) for spec in specs
        )

    receive = [own_buffers() for _ in range(min(2, world_size - 1))]
    working, sending, incoming = (own_accumulators() for _ in range(3))
    shard: Shard = tuple(columns)
    in_flight: list[Work] = []
    for hop in range(world_size):
        owner = (rank - hop) % world_size
        behind = (owner - 1) % world_size
        arriving: Shard = ()
        shard_in_flight: list[Work] = []
        if hop < world_size - 1:
            arriving = _first_rows(receive[hop % 2], row_counts[behind])
            shard_in_flight = neighbours.post(shard, arriving, _SHARD_TAG)
        contributions = _first_rows(working, row_counts[owner])
        visit(owner, shard, contributions)
        _wait(in_flight)
        if hop > 0:
            for mine, theirs in zip(
                contributions, _first_rows(incoming, row_counts[owner]), strict=True
            ):
                add(mine, theirs)
        in_flight = neighbours.post(
            contributions, _first_rows(incoming, row_counts[behind]), _ACCUMULATOR_TAG
        )
        working, sending = sending, working
        _wait(shard_in_flight)
        shard = arriving
    _wait(in_flight)
    return _first_rows(incoming, row_counts[rank])


class _Neighbours:
    """Sends to the next rank of the ring while receiving from the previous one."""

    def __init__(self, transfer: ProcessGroup, rank: int, world_size: int) -> None:
        self.transfer = transfer
        self.next = (rank + 1) % world_size
        self.previous = (rank - 1) % world_size

    def post(self, outgoing: Shard, arriving: Shard, tag: int) -> list[Work]:
        """Start both transfers; empty tensors are not sent, which both ends know."""
        # `group_peer`, not `peer`: ranks here count inside the group.
        operations = [
            dist.P2POp(dist.isend, tensor, group=self.transfer, tag=tag, group_peer=self.next)
            for tensor in outgoing
            if tensor.numel()
        ] + [
            dist.P2POp(dist.irecv, tensor, group=self.transfer, tag=tag, group_peer=self.previous)
            for tensor in arriving
            if tensor.numel()
        ]
        return list(dist.batch_isend_irecv(operations)) if operations else []


def _wait(requests: list[Work]) -> None:
    # One request for the batch on NCCL, one per transfer on gloo.
    for request in requests:
        request.wait()


def _first_rows(buffers: Shard, num_rows: int) -> Shard:
    return tuple(buffer[:num_rows] for buffer in buffers)
