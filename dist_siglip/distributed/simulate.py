"""Simulation of one rank of a large world whose other ranks do not exist.

A step of a thousand ranks cannot be run here, but one rank's part of it can: its memory, its
compute and the code that moves buffers are the real ones. PyTorch's fake process group stands for
the world, and every absent rank is taken for a copy of this one: what it would send is what this
rank sends at the same step. So numbers are those of a global batch of W equal local batches and
can be checked too (all but the accumulators of all_gather, whose fake reduce-scatter adds nothing).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import ProcessGroup

from dist_siglip.distributed.groups import Control, Transfers, set_companions
from dist_siglip.distributed.handshake import Handshake
from dist_siglip.distributed.p2p import Message, P2PChannel, PendingBatch
from dist_siglip.distributed.ring import Shard, Visitor
from dist_siglip.distributed.world import set_local_world_size
from dist_siglip.errors import UserError


@contextmanager
def simulated_world(
    world_size: int, *, rank: int = 0, local_world_size: int = 1, max_visits: int | None = None
) -> Iterator[ProcessGroup]:
    """Make this process one rank of ``world_size``, until the block ends.

    Args:
        world_size: ranks of the simulated world.
        rank: which of them this process is.
        local_world_size: ranks per node.
        max_visits: shards of an exchange that are really visited; what the other visits would
            contribute is taken as zero, so that times and values are of these visits only. None
            visits all.

    Yields:
        The default process group of the simulated world.

    Raises:
        UserError: if a process group runs already, or sizes do not fit.

    Example:
        >>> import torch
        >>> from dist_siglip.distributed import circulate
        >>> owners = []
        >>> with simulated_world(4, rank=1):
        ...     circulate([torch.ones(2)], lambda owner, *_: owners.append(owner), exchange="ring")
        ()
        >>> owners
        [1, 0, 3, 2]
    """
    if dist.is_initialized():
        raise UserError("a simulated world needs a process without a process group")
    if max_visits is not None and max_visits < 1:
        raise UserError(f"max_visits ({max_visits}) must be at least 1")
    # Registers the backend "fake".
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        group = dist.group.WORLD
        assert group is not None  # just initialised
        set_local_world_size(local_world_size, group)
        channel = _LoopbackChannel(group)
        set_companions(
            group,
            Control(
                Handshake(lambda values, _: list(values), lambda message: [message] * world_size)
            ),
            Transfers(
                group=group,
                channel=channel,
                crossing=channel,
                limit_visits=None if max_visits is None else _first_visits(max_visits),
            ),
        )
        yield group
    finally:
        dist.destroy_process_group()


class _LoopbackChannel(P2PChannel):
    """Posts to the fake group, then delivers what this rank sent as what it receives."""

    def post(self, outgoing: Sequence[Message], arriving: Sequence[Message]) -> PendingBatch:
        batch = super().post(outgoing, arriving)
        for sent, received in zip(batch.outgoing, batch.arriving, strict=True):
            for theirs, mine in zip(sent.tensors, received.tensors, strict=True):
                mine.copy_(theirs)
        return batch


def _first_visits(count: int) -> Callable[[Visitor], Visitor]:
    def limit(visit: Visitor) -> Visitor:
        left = iter(range(count))

        def visit_or_skip(owner: int, shard: Shard, contributions: Shard) -> None:
            if next(left, None) is not None:
                visit(owner, shard, contributions)
                return
            for contribution in contributions:
                contribution.zero_()

        return visit_or_skip

    return limit
