"""Exchanges over several nodes: shards cross from node to node, and go around inside.

M nodes of g ranks make M stages. In stage j the shards of the node j places back are at this node,
each on the rank of its own local index, and are shown to all ranks of the node:

    two_level    by a ring of g hops: four shards and five accumulators, whatever g and M are
    node_gather  all at once: M visits instead of W, of shards g times as wide, which fill a GPU
                 better and cost the host less; memory for the rows of a node

Meanwhile the shards of the next stage cross, every rank's to the same local index of the next node,
each by its own network card. What a stage adds to a shard's accumulators is summed up inside the
node and crosses during the next stage. Both crossings are waited for after a whole stage: the links
between nodes may be g times as slow as those inside before anything waits for them.

Bytes per rank, b rows: (M - 1) b of shards and M b of accumulators between nodes; inside of them
M (g - 1) b of either (two_level: M - 1 times one hop less of accumulators).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from dist_siglip.distributed.p2p import Message, P2PChannel, PendingBatch
from dist_siglip.distributed.ring import AccumulatorSpec, Shard, Visitor

_SHARD, _SUMS, _NEXT_SHARD, _NODE_SUMS = range(4)  # tags


class Place(NamedTuple):
    """This rank among the nodes.

    Attributes:
        rank: in the group.
        num_nodes: M; node k holds the ranks k g to (k + 1) g - 1.
        size: ranks of a node, g.
    """

    rank: int
    num_nodes: int
    size: int

    def owner(self, stage: int, local: int | None = None) -> int:
        """Rank whose shard is at local index ``local`` (here, if None) as a stage begins."""
        node, here = divmod(self.rank, self.size)
        local = here if local is None else local
        return (node - stage) % self.num_nodes * self.size + local % self.size

    def mate(self, local: int) -> int:
        """Rank of this node with a local index."""
        return self.rank // self.size * self.size + local % self.size

    @property
    def local(self) -> int:
        """Index of this rank in its node."""
        return self.rank % self.size

    @property
    def mates(self) -> list[int]:
        """Other ranks of this node, the next one first."""
        return [self.mate(self.local + step) for step in range(1, self.size)]


class _Pass:
    """What both exchanges share: the crossings, and buffers by number of rows."""

    def __init__(
        self,
        columns: Shard,
        specs: Sequence[AccumulatorSpec],
        add: Callable[[Tensor, Tensor], None],
        row_counts: Sequence[int],
        place: Place,
        channel: P2PChannel,
        crossing: P2PChannel,
    ) -> None:
        self.columns, self.specs, self.add, self.row_counts = columns, specs, add, row_counts
        self.place, self.channel, self.crossing = place, channel, crossing
        self.longest = max(row_counts)
        self.carried = columns  # at this rank as a stage begins
        ahead = 2 if place.num_nodes > 1 else 0
        self._next_shards = [self.shard_buffer(self.longest) for _ in range(ahead)]
        self._crossing_shards = PendingBatch()
        self._node_sums = self.accumulator_buffer(self.longest)
        self._arriving_sums = self.accumulator_buffer(self.longest)
        self._crossing_sums = PendingBatch()
        self._home: Shard = ()

    def shard_buffer(self, rows: int) -> Shard:
        return tuple(column.new_empty((rows, *column.shape[1:])) for column in self.columns)

    def accumulator_buffer(self, rows: int) -> Shard:
        return tuple(
            self.columns[0].new_empty((rows, *spec.row_shape), dtype=spec.dtype)
            for spec in self.specs
        )

    def rows_of(self, buffers: Shard, owner: int) -> Shard:
        return tuple(buffer[: self.row_counts[owner]] for buffer in buffers)

    def send_ahead(self, stage: int) -> None:
        """Begin to bring the shards of stage + 1 here; those of ``stage`` are."""
        if stage + 1 >= self.place.num_nodes:
            return
        here, there = self.place.owner(stage), self.place.owner(stage + 1)
        arriving = self.rows_of(self._next_shards[stage % 2], there)
        self._crossing_shards = self.crossing.post(
            [_shard(self.place.owner(-1), self.carried, here, _NEXT_SHARD)],
            [_shard(self.place.owner(1), arriving, there, _NEXT_SHARD)],
        )
        self._arriving = arriving

    def await_next(self, stage: int) -> None:
        """Have the shards of stage + 1 here."""
        if stage + 1 < self.place.num_nodes:
            self.crossing.wait(self._crossing_shards)
            self.carried = self._arriving

    def add_node_sums(self, stage: int, shift: int, sums: Shard) -> None:
        """Add what earlier nodes have collected for a shard to ``sums`` of this node, and send it.

        Args:
            stage: of which the sums are.
            shift: local index of the shard's owner, beyond that of this rank.
            sums: of the ranks of this node.
        """
        if not self.specs:
            return
        owner = self.place.owner(stage, self.place.local + shift)
        total = self.rows_of(self._node_sums, owner)
        self.crossing.wait(self._crossing_sums)
        for mine, ours, theirs in zip(
            total, sums, self.rows_of(self._arriving_sums, owner), strict=True
        ):
            mine.copy_(ours)
            if stage:
                self.add(mine, theirs)
        is_last = stage + 1 == self.place.num_nodes
        step = shift if is_last else 0  # home at last, with the next node on the way there
        following = self.place.owner(stage + 1, self.place.local + (0 if is_last else shift))
        target, source = (
            self.place.owner(-1, self.place.local + step),
            self.place.owner(1, self.place.local - step),
        )
        if target == self.place.rank:
            self._home = total
            return
        arriving = self.rows_of(self._arriving_sums, following)
        self._crossing_sums = self.crossing.post(
            [_sums(target, total, owner, _NODE_SUMS)],
            [_sums(source, arriving, following, _NODE_SUMS)],
        )
        self._home = arriving

    def finish(self) -> Shard:
        """Return the accumulators of the own rows."""
        self.crossing.wait(self._crossing_sums)
        return self._home


def run_two_level(
    columns: Shard,
    visit: Visitor,
    specs: Sequence[AccumulatorSpec],
    add: Callable[[Tensor, Tensor], None],
    row_counts: Sequence[int],
    place: Place,
    channel: P2PChannel,
    crossing: P2PChannel,
) -> Shard:
    """Run one rank's part of ``two_level``; arguments and errors are those of ``run_ring``.

    Args:
        columns: this rank's shard.
        visit: called once per shard.
        specs: the accumulators.
        add: combines in place into its first argument.
        row_counts: rows of every rank's shard.
        place: this rank among the nodes.
        channel: for what stays in the node.
        crossing: for what does not; what waits in it holds nothing up in ``channel``.
    """
    run = _Pass(columns, specs, add, row_counts, place, channel, crossing)
    received = [run.shard_buffer(run.longest) for _ in range(2)]
    working, leaving, incoming = (run.accumulator_buffer(run.longest) for _ in range(3))
    following, before = place.mate(place.local + 1), place.mate(place.local - 1)
    pending = PendingBatch()

    def owner_at(stage: int, hop: int) -> int:
        return place.owner(stage, place.local - hop)

    def move_shard(
        stage: int, hop: int, shard: Shard
    ) -> tuple[list[Message], list[Message], Shard]:
        """Bring the shard of this hop on; return the messages, and the shard that arrives."""
        if hop + 1 >= place.size:
            return [], [], ()
        there = owner_at(stage, hop + 1)
        arriving = run.rows_of(received[hop % 2], there)
        return (
            [_shard(following, shard, owner_at(stage, hop))],
            [_shard(before, arriving, there)],
            arriving,
        )

    for stage in range(place.num_nodes):
        run.send_ahead(stage)
        shard = run.carried
        outgoing, arriving, next_shard = move_shard(stage, 0, shard)
        pending = channel.post(outgoing, arriving)
        for hop in range(place.size):
            owner = owner_at(stage, hop)
            contributions = run.rows_of(working, owner)
            visit(owner, shard, contributions)
            channel.wait(pending)
            if hop:
                for mine, theirs in zip(contributions, run.rows_of(incoming, owner), strict=True):
                    add(mine, theirs)
            if hop + 1 == place.size:
                # This shard began at the next local index.
                run.add_node_sums(stage, 1 if place.size > 1 else 0, contributions)
                break
            shard = next_shard
            outgoing, arriving, next_shard = move_shard(stage, hop + 1, shard)
            if specs:
                there = owner_at(stage, hop + 1)
                outgoing.insert(0, _sums(following, contributions, owner))
                arriving.insert(0, _sums(before, run.rows_of(incoming, there), there))
            pending = channel.post(outgoing, arriving)
            working, leaving = leaving, working
        run.await_next(stage)
    return run.finish()


def run_node_gather(
    columns: Shard,
    visit: Visitor,
    specs: Sequence[AccumulatorSpec],
    add: Callable[[Tensor, Tensor], None],
    row_counts: Sequence[int],
    place: Place,
    channel: P2PChannel,
    crossing: P2PChannel,
) -> Shard:
    """Run one rank's part of ``node_gather``; arguments are those of ``run_two_level``.

    The shards of a stage are gathered during the stage before, and its sums are exchanged during
    the one after.
    """
    run = _Pass(columns, specs, add, row_counts, place, channel, crossing)
    most = max(widths(row_counts, place.size))
    gathered = [run.shard_buffer(most) for _ in range(2)]
    contributed = [run.accumulator_buffer(most) for _ in range(2)]
    parts = [run.accumulator_buffer(run.longest) for _ in place.mates]
    sums = PendingBatch()

    def gather(stage: int) -> PendingBatch:
        """Show the carried shard to all ranks of the node."""
        slices = _slices(run, stage)
        buffers = gathered[stage % 2]
        owner = place.owner(stage)
        for buffer, mine in zip(buffers, run.carried, strict=True):
            buffer[slices[place.local]].copy_(mine)
        return channel.post(
            [_shard(mate, run.carried, owner) for mate in place.mates],
            [
                _shard(
                    mate,
                    tuple(buffer[slices[mate % place.size]] for buffer in buffers),
                    place.owner(stage, mate),
                )
                for mate in place.mates[::-1]
            ],
        )

    def send_sums(stage: int) -> PendingBatch:
        """Give every rank of the node what this one adds to the shard it holds."""
        if not specs:
            return PendingBatch()
        slices, owner = _slices(run, stage), place.owner(stage)
        return channel.post(
            [
                _sums(
                    mate,
                    tuple(total[slices[mate % place.size]] for total in contributed[stage % 2]),
                    place.owner(stage, mate),
                )
                for mate in place.mates
            ],
            [
                _sums(mate, run.rows_of(part, owner), owner)
                for mate, part in zip(place.mates[::-1], parts, strict=True)
            ],
        )

    def take_sums(stage: int) -> None:
        """Add up what the ranks of the node have sent, and send it on."""
        channel.wait(sums)
        owner, here = place.owner(stage), _slices(run, stage)[place.local]
        mine = tuple(total[here] for total in contributed[stage % 2])
        for part in parts:
            for total, theirs in zip(mine, run.rows_of(part, owner), strict=True):
                add(total, theirs)
        run.add_node_sums(stage, 0, mine)

    def visit_rows(stage: int, first: int, stop: int) -> None:
        """Visit the shards of these local indices as one."""
        slices = _slices(run, stage)
        rows = slice(slices[first].start, slices[stop - 1].stop)
        visit(
            place.owner(stage, first),
            tuple(buffer[rows] for buffer in gathered[stage % 2]),
            tuple(total[rows] for total in contributed[stage % 2]),
        )

    run.send_ahead(0)
    shards = gather(0)
    visit_rows(0, place.local, place.local + 1)
    channel.wait(shards)
    for stage in range(place.num_nodes):
        run.await_next(stage)
        shards = PendingBatch()
        if stage + 1 < place.num_nodes:
            shards = gather(stage + 1)
            run.send_ahead(stage + 1)
        for first, stop in _stretches(stage, place):
            visit_rows(stage, first, stop)
        if stage:
            take_sums(stage - 1)
        sums = send_sums(stage)
        channel.wait(shards)
    take_sums(place.num_nodes - 1)
    return run.finish()


def widths(row_counts: Sequence[int], size: int) -> list[int]:
    """Return the rows of every node.

    Example:
        >>> widths([3, 0, 1, 2], 2)
        [3, 3]
    """
    return [sum(row_counts[first : first + size]) for first in range(0, len(row_counts), size)]


def _slices(run: _Pass, stage: int) -> list[slice]:
    """Rows of each local index among those of the node whose shards are here."""
    first, slices, start = run.place.owner(stage, 0), [], 0
    for count in run.row_counts[first : first + run.place.size]:
        slices.append(slice(start, start + count))
        start += count
    return slices


def _stretches(stage: int, place: Place) -> Iterator[tuple[int, int]]:
    """Local indices that are visited as one; the own shard has been visited alone."""
    if stage:
        yield 0, place.size
        return
    for first, stop in ((0, place.local), (place.local + 1, place.size)):
        if first < stop:
            yield first, stop


def _shard(peer: int, tensors: Shard, owner: int, tag: int = _SHARD) -> Message:
    return Message(peer, tensors, tag, "shard", owner)


def _sums(peer: int, tensors: Shard, owner: int, tag: int = _SUMS) -> Message:
    return Message(peer, tensors, tag, "accumulators of shard", owner)
