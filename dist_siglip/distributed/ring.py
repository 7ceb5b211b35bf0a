"""Transfers of shards and their accumulators along the paths of a ring schedule.

While a shard is visited one batch of transfers is under way: this shard goes on to the next rank,
the one after it arrives, the accumulators of the shard visited before leave, and those of the
shard that is visited arrive, to which its contributions are added afterwards. So transfers hide
behind the visit, and a hop posts and waits once. Buffers are owned and reused: two shards and
three accumulators per path (one for ring, two for two_way), whatever the number of
ranks. Three, because while one accumulator is written by the visit another arrives and a third
leaves. A pass that comes again at every step keeps them, but for the accumulator that came home,
which is its result: addresses then repeat, and nothing is allocated while transfers hold memory.

Bytes per rank: W - 1 shards and W accumulators sent; nothing more in a backward pass.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

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
    *,
    comes_again: bool = False,
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
        comes_again: whether to keep the buffers for the next pass of this kind.

    Returns:
        The finished accumulators of this rank's rows.

    Raises:
        RuntimeError: within the time limit of the group, if a rank does not take part.
    """
    memory = RingMemory.of(columns, specs, max(row_counts), len(paths), channel)
    buffers = [
        RingBuffers(number, path, columns, memory, row_counts) for number, path in enumerate(paths)
    ]
    pending = _post(channel, [buffer.move_shard(0) for buffer in buffers])
    for step in range(max(len(path.hops) for path in paths)):
        present = [buffer for buffer in buffers if step < len(buffer.path.hops)]
        for buffer in present:
            buffer.visit(step, visit)
        channel.wait(pending)
        for buffer in present:
            buffer.add_arrived(step, add)
        # The same order on both ends, which is what NCCL matches by.
        pending = _post(
            channel,
            [
                move
                for buffer in present
                for move in (buffer.move_accumulators(step), buffer.move_shard(step + 1))
            ],
        )
    channel.wait(pending)
    finished, *others = (buffer.finished() for buffer in buffers)
    for other in others:
        for mine, theirs in zip(finished, other, strict=True):
            add(mine, theirs)
    if comes_again:
        memory.keep(channel)
    return finished


class RingMemory:
    """Memory of a pass: of each path two shards, and three accumulators of which one is given away.

    Attributes:
        received: by path, two shards.
        added: by path, two accumulators for what is written and what leaves.
        arrived: by path, the accumulator that arrives; in the end it is the result.
    """

    def __init__(
        self,
        key: Hashable,
        columns: Shard,
        specs: Sequence[AccumulatorSpec],
        longest: int,
        num_paths: int,
    ) -> None:
        self.key = key
        self.received = [
            [
                tuple(column.new_empty((longest, *column.shape[1:])) for column in columns)
                for _ in range(2)
            ]
            for _ in range(num_paths)
        ]
        self.added = [
            [_accumulators(columns, specs, longest) for _ in range(2)] for _ in range(num_paths)
        ]
        self.arrived: list[Shard] = []

    @classmethod
    def of(
        cls,
        columns: Shard,
        specs: Sequence[AccumulatorSpec],
        longest: int,
        num_paths: int,
        channel: P2PChannel,
    ) -> "RingMemory":
        """Take what an earlier pass of this kind has kept, or allocate."""
        device = columns[0].device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        shapes = tuple((column.shape[1:], column.dtype, column.device) for column in columns)
        key = (shapes, tuple(specs), longest, num_paths, stream)
        kept = _kept.get(channel, {}).pop(key, None)
        memory = cls(key, columns, specs, longest, num_paths) if kept is None else kept
        memory.arrived = [_accumulators(columns, specs, longest) for _ in range(num_paths)]
        return memory

    def keep(self, channel: P2PChannel) -> None:
        """Leave all but the result for the next pass of this kind."""
        self.arrived = []
        kept = _kept.setdefault(channel, {})
        kept[self.key] = self
        while len(kept) > _MOST_KEPT:
            del kept[next(iter(kept))]


# What the last kinds of passes over a channel keep; a loss has one or two kinds.
_MOST_KEPT = 4
_kept: "WeakKeyDictionary[P2PChannel, dict[Hashable, RingMemory]]" = WeakKeyDictionary()


def _accumulators(columns: Shard, specs: Sequence[AccumulatorSpec], longest: int) -> Shard:
    return tuple(
        columns[0].new_empty((longest, *spec.row_shape), dtype=spec.dtype) for spec in specs
    )


class _Move(NamedTuple):
    """Messages of one path: nothing where there are no tensors to move."""

    outgoing: Message
    arriving: Message


def _post(channel: P2PChannel, moves: Sequence[_Move | None]) -> PendingBatch:
    return channel.post(
        [move.outgoing for move in moves if move], [move.arriving for move in moves if move]
    )


class RingBuffers:
    """Buffers of one path."""

    def __init__(
        self,
        number: int,
        path: RingPath,
        columns: Shard,
        memory: RingMemory,
        row_counts: Sequence[int],
    ) -> None:
        self.path, self.row_counts = path, row_counts
        self.shard_tag, self.accumulator_tag = 2 * number, 2 * number + 1
        self.rank = path.hops[0].owner
        self.longest = max(row_counts)
        self.received = memory.received[number]
        self.working, self.leaving = memory.added[number]
        self.incoming = memory.arrived[number]
        self.shard = self.next_shard = columns
        self.contributions: Shard = ()

    def move_shard(self, step: int) -> _Move | None:
        """Take the shard of this step; return the messages that bring it on and the next here."""
        self.shard = self.next_shard
        if step + 1 >= len(self.path.hops):
            return None
        hop, following = self.path.hops[step : step + 2]
        self.next_shard = self._rows(self.received[step % 2], following.owner)
        return _Move(
            Message(hop.goes_to, self.shard, self.shard_tag, "shard", hop.owner),
            Message(following.came_from, self.next_shard, self.shard_tag, "shard", following.owner),
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

    def move_accumulators(self, step: int) -> _Move | None:
        """Send on what was just added up; receive the next shard's, or the own one at last."""
        if step < self.path.first_visit or not self.contributions:
            return None
        hop = self.path.hops[step]
        if step + 1 < len(self.path.hops):
            following = self.path.hops[step + 1]
            sender, owner = following.came_from, following.owner
        else:
            sender, owner = self.path.home_from, self.rank
        tag, what = self.accumulator_tag, "accumulators of shard"
        self.working, self.leaving = self.leaving, self.working
        return _Move(
            Message(hop.goes_to, self.contributions, tag, what, hop.owner),
            Message(sender, self._rows(self.incoming, owner), tag, what, owner),
        )

    def finished(self) -> Shard:
        """Return the own accumulators, once the last transfer has been waited for."""
        return self._rows(self.incoming, self.rank)

    def _rows(self, buffers: Shard, owner: int) -> Shard:
        rows = self.row_counts[owner]
        return buffers if rows == self.longest else tuple(buffer[:rows] for buffer in buffers)
