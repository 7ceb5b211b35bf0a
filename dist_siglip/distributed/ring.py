"""Transfers of shards and their accumulators along the paths of a ring schedule.

A shard's next transfer is posted before its visit and waited for after it; the accumulator of
the shard, sent one step ago, is waited for only when there is something to add. So transfers hide
behind the visit. Buffers are owned and reused: two shards and three accumulators per path
(one for ring and two_level, two for two_way), whatever the number of ranks. Three,
because while one accumulator is written by the visit another arrives and a third leaves.

Bytes per rank: W - 1 shards and W accumulators sent; nothing more in a backward pass.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.distributed.p2p import Message, P2PChannel, PendingBatch
from dist_siglip.distributed.ring_schedule import RingPath

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


def run_ring(
    columns: Shard,
    visit: Visitor,
    specs: Sequence[AccumulatorSpec],
    add: Callable[[Tensor, Tensor], None],
    row_counts: Sequence[int],
    paths: Sequence[RingPath],
    channel: P2PChannel,
) -> Shard:
    """Run one rank's part of a schedule; see ``exchange.circulate``.

    Args:
        columns: this rank's shard, contiguous tensors.
        visit: called once per shard; overwrites the contributions it is given.
        specs: the accumulators.
        add: ``add(mine, theirs)`` combines in place into ``mine``.
        row_counts: rows of every rank's shard.
        paths: hops of this rank, from ``ring_schedule.ring_paths``; at least two ranks.
        channel: of a group that serves only these transfers.

    Returns:
        The finished accumulators of this rank's rows.

    Raises:
        RuntimeError: within the time limit of the group, if a rank does not take part.
    """
    buffers = [
        RingBuffers(number, path, columns, specs, row_counts) for number, path in enumerate(paths)
    ]
    accumulators = PendingBatch()
    for step in range(max(len(path.hops) for path in paths)):
        present = [buffer for buffer in buffers if step < len(buffer.path.hops)]
        shards = _post(channel, [buffer.move_shard(step) for buffer in present])
        for buffer in present:
            buffer.visit(step, visit)
        channel.wait(accumulators)
        for buffer in present:
            buffer.add_arrived(step, add)
        accumulators = _post(channel, [buffer.move_accumulators(step) for buffer in present])
        channel.wait(shards)
    channel.wait(accumulators)
    finished, *others = (buffer.finished() for buffer in buffers)
    for other in others:
        for mine, theirs in zip(finished, other, strict=True):
            add(mine, theirs)
    return finished


class _Move(NamedTuple):
    """Messages of one path at one step."""

    outgoing: tuple[Message, ...] = ()
    arriving: tuple[Message, ...] = ()


def _post(channel: P2PChannel, moves: Sequence[_Move]) -> PendingBatch:
    # Path by path: the same order on both ends, which is what NCCL matches by.
    return channel.post(
        [message for move in moves for message in move.outgoing],
        [message for move in moves for message in move.arriving],
    )


class RingBuffers:
    """Buffers of one path."""

    def __init__(
        self,
        number: int,
        path: RingPath,
        columns: Shard,
        specs: Sequence[AccumulatorSpec],
        row_counts: Sequence[int],
    ) -> None:
        self.path, self.row_counts = path, row_counts
        self.shard_tag, self.accumulator_tag = 2 * number, 2 * number + 1
        self.rank = path.hops[0].owner
        longest = max(row_counts)
        self.received = [
            tuple(column.new_empty((longest, *column.shape[1:])) for column in columns)
            for _ in range(2)
        ]
        self.working, self.leaving, self.incoming = (
            tuple(
                columns[0].new_empty((longest, *spec.row_shape), dtype=spec.dtype) for spec in specs
            )
            for _ in range(3)
        )
        self.shard = self.next_shard = columns
        self.contributions: Shard = ()

    def move_shard(self, step: int) -> _Move:
        """Return the messages that bring the shard on and the next one here."""
        self.shard = self.next_shard
        if step + 1 == len(self.path.hops):
            return _Move()
        hop, following = self.path.hops[step : step + 2]
        self.next_shard = self._rows(self.received[step % 2], following.owner)
        return _Move(
            (self._shard_message(hop.goes_to, self.shard, hop.owner),),
            (self._shard_message(following.came_from, self.next_shard, following.owner),),
        )

    def visit(self, step: int, visit: Visitor) -> None:
        """Visit the shard that is here; its own shard only on the path that says so."""
        if step < self.path.first_visit:
            return
        owner = self.path.hops[step].owner
        self.contributions = self._rows(self.working, owner)
        visit(owner, self.shard, self.contributions)

    def add_arrived(self, step: int, add: Callable[[Tensor, Tensor], None]) -> None:
        """Add what the ranks before this one have collected for the shard just visited."""
        if step <= self.path.first_visit:
            return
        arrived = self._rows(self.incoming, self.path.hops[step].owner)
        for mine, theirs in zip(self.contributions, arrived, strict=True):
            add(mine, theirs)

    def move_accumulators(self, step: int) -> _Move:
        """Send on what was just added up; receive the next shard's, or the own one at last."""
        if step < self.path.first_visit:
            return _Move()
        hop = self.path.hops[step]
        outgoing = self._accumulator_message(hop.goes_to, self.contributions, hop.owner)
        if step + 1 < len(self.path.hops):
            following = self.path.hops[step + 1]
            sender, owner = following.came_from, following.owner
        else:
            sender, owner = self.path.home_from, self.rank
        arriving = self._accumulator_message(sender, self._rows(self.incoming, owner), owner)
        self.working, self.leaving = self.leaving, self.working
        return _Move((outgoing,), (arriving,))

    def finished(self) -> Shard:
        """Return the own accumulators, once the last transfer has been waited for."""
        return self._rows(self.incoming, self.rank)

    def _rows(self, buffers: Shard, owner: int) -> Shard:
        return tuple(buffer[: self.row_counts[owner]] for buffer in buffers)

    def _shard_message(self, peer: int, tensors: Shard, owner: int) -> Message:
        return Message(peer, tensors, self.shard_tag, f"shard {owner}")

    def _accumulator_message(self, peer: int, tensors: Shard, owner: int) -> Message:
        return Message(peer, tensors, self.accumulator_tag, f"accumulators of shard {owner}")
