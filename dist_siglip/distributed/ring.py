"""Carries shards and their accumulators as a schedule says.

A shard's next transfer is posted before its visit and waited for after it; the accumulator of
the shard, sent one step ago, is waited for only when there is something to add. So transfers hide
behind the visit. Buffers are owned and reused: two shards and three accumulators per lane of the
schedule (one lane for ring and two_level, two for two_way), whatever the number of ranks. Three,
because while one accumulator is written by the visit another arrives and a third leaves.

Bytes per rank: W - 1 shards and W accumulators sent; nothing more in a backward pass.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.distributed.p2p import Mail, Parcel, Posted
from dist_siglip.distributed.ring_schedule import Lane

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


def travel(
    columns: Shard,
    visit: Visitor,
    specs: Sequence[AccumulatorSpec],
    add: Callable[[Tensor, Tensor], None],
    row_counts: Sequence[int],
    lanes: Sequence[Lane],
    mail: Mail,
) -> Shard:
    """Run one rank's part of a schedule; see ``exchange.circulate``.

    Args:
        columns: this rank's shard, contiguous tensors.
        visit: called once per shard; overwrites the contributions it is given.
        specs: the accumulators.
        add: ``add(mine, theirs)`` combines in place into ``mine``.
        row_counts: rows of every rank's shard.
        lanes: what passes this rank, from ``schedule.lanes_of``; at least two ranks.
        mail: of a group that serves only these transfers.

    Returns:
        The finished accumulators of this rank's rows.

    Raises:
        RuntimeError: within the time limit of the group, if a rank does not take part.
    """
    carriers = [
        _Carrier(number, lane, columns, specs, row_counts) for number, lane in enumerate(lanes)
    ]
    accumulators = Posted()
    for step in range(max(len(lane.stops) for lane in lanes)):
        present = [carrier for carrier in carriers if step < len(carrier.lane.stops)]
        shards = _post(mail, [carrier.move_shard(step) for carrier in present])
        for carrier in present:
            carrier.visit(step, visit)
        mail.wait(accumulators)
        for carrier in present:
            carrier.add_arrived(step, add)
        accumulators = _post(mail, [carrier.move_accumulators(step) for carrier in present])
        mail.wait(shards)
    mail.wait(accumulators)
    finished, *others = (carrier.finished() for carrier in carriers)
    for other in others:
        for mine, theirs in zip(finished, other, strict=True):
            add(mine, theirs)
    return finished


class _Move(NamedTuple):
    """The parcels of one lane at one step."""

    outgoing: tuple[Parcel, ...] = ()
    arriving: tuple[Parcel, ...] = ()


def _post(mail: Mail, moves: Sequence[_Move]) -> Posted:
    # Lane by lane: the same order on both ends, which is what NCCL matches by.
    return mail.post(
        [parcel for move in moves for parcel in move.outgoing],
        [parcel for move in moves for parcel in move.arriving],
    )


class _Carrier:
    """The buffers of one lane, and what is in them."""

    def __init__(
        self,
        number: int,
        lane: Lane,
        columns: Shard,
        specs: Sequence[AccumulatorSpec],
        row_counts: Sequence[int],
    ) -> None:
        self.lane, self.row_counts = lane, row_counts
        self.shard_tag, self.accumulator_tag = 2 * number, 2 * number + 1
        self.rank = lane.stops[0].owner
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
        """Say where the shard goes and where the next one comes from."""
        self.shard = self.next_shard
        if step + 1 == len(self.lane.stops):
            return _Move()
        stop, following = self.lane.stops[step : step + 2]
        self.next_shard = self._rows(self.received[step % 2], following.owner)
        return _Move(
            (self._shard_parcel(stop.goes_to, self.shard, stop.owner),),
            (self._shard_parcel(following.came_from, self.next_shard, following.owner),),
        )

    def visit(self, step: int, visit: Visitor) -> None:
        """Visit the shard that is here; its own shard only on the lane that says so."""
        if step < self.lane.first_visit:
            return
        owner = self.lane.stops[step].owner
        self.contributions = self._rows(self.working, owner)
        visit(owner, self.shard, self.contributions)

    def add_arrived(self, step: int, add: Callable[[Tensor, Tensor], None]) -> None:
        """Add what the ranks before this one have collected for the shard just visited."""
        if step <= self.lane.first_visit:
            return
        arrived = self._rows(self.incoming, self.lane.stops[step].owner)
        for mine, theirs in zip(self.contributions, arrived, strict=True):
            add(mine, theirs)

    def move_accumulators(self, step: int) -> _Move:
        """Send on what was just added up; receive the next shard's, or the own one at last."""
        if step < self.lane.first_visit:
            return _Move()
        stop = self.lane.stops[step]
        outgoing = self._accumulator_parcel(stop.goes_to, self.contributions, stop.owner)
        if step + 1 < len(self.lane.stops):
            following = self.lane.stops[step + 1]
            sender, owner = following.came_from, following.owner
        else:
            sender, owner = self.lane.home_from, self.rank
        arriving = self._accumulator_parcel(sender, self._rows(self.incoming, owner), owner)
        self.working, self.leaving = self.leaving, self.working
        return _Move((outgoing,), (arriving,))

    def finished(self) -> Shard:
        """Return the own accumulators, once the last transfer has been waited for."""
        return self._rows(self.incoming, self.rank)

    def _rows(self, buffers: Shard, owner: int) -> Shard:
        return tuple(buffer[: self.row_counts[owner]] for buffer in buffers)

    def _shard_parcel(self, peer: int, tensors: Shard, owner: int) -> Parcel:
        return Parcel(peer, tensors, self.shard_tag, f"shard {owner}")

    def _accumulator_parcel(self, peer: int, tensors: Shard, owner: int) -> Parcel:
        return Parcel(peer, tensors, self.accumulator_tag, f"accumulators of shard {owner}")
