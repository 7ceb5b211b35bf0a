"""Exchanges: how the shard of every rank passes this one. They know nothing of formulas.

An exchange brings the columns of every rank past this rank once. What is done with a shard is
the visitor's business; what a visitor adds to a shard's accumulators is combined over all ranks
and comes home to the rank that owns the shard.

    local       one rank: its own shard
    ring        every rank sends to the next one; memory does not grow with the number of ranks
    two_way     shards travel both ways for half the distance: half the steps, twice the buffers
    two_level   rings inside the nodes, while shards cross to the next node, all ranks of a node at
                once: every network card works, where a ring uses one per node
    node_gather likewise, but shards are gathered inside the node and visited as one: as many steps
                as nodes, and memory for the rows of a node
    all_gather  gather every shard, visit, reduce-scatter the accumulators: two collectives, no
                chain of hops, but memory for the rows of all ranks
    auto        the fastest by the cost model, from sizes, nodes and measured speeds; the reasons
                are logged once

``ring_schedule`` says which way shards go in rings of all ranks, ``ring`` carries them;
``node_ring`` does both for several nodes; ``world`` knows the nodes.
All give the same numbers up to the order of the sums.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed.collectives import gather_padded
from dist_siglip.distributed.combine import COMBINE_IN_PLACE, Combine, reduce_scatter
from dist_siglip.distributed.cost_model import Cluster, Problem, predict
from dist_siglip.distributed.groups import control_of, resolve_group, transfers_of
from dist_siglip.distributed.handshake import Agreement, describe_shard, read_numbers
from dist_siglip.distributed.node_ring import Place, run_node_gather, run_two_level, widths
from dist_siglip.distributed.ring import AccumulatorSpec, Shard, Visitor, run_ring
from dist_siglip.distributed.ring_schedule import ring_paths
from dist_siglip.distributed.speeds import Speeds
from dist_siglip.distributed.world import local_world_size_of
from dist_siglip.errors import UserError

logger = logging.getLogger(__name__)

ExchangeName = Literal["auto", "local", "all_gather", "ring", "two_way", "two_level", "node_gather"]

RunName = Literal["all_gather", "ring", "two_way", "two_level", "node_gather"]

# "auto" gathers the rows of all ranks, or of those of a node, up to so many bytes.
GATHER_LIMIT_BYTES = 64 * 2**20
NODE_GATHER_LIMIT_BYTES = 512 * 2**20

_UNMEASURED = Speeds()


@dataclass(frozen=True)
class Exchange:
    """An exchange whose ranks have agreed on what they send; ``run`` may be called once.

    Attributes:
        name: the exchange in use, never "auto".
        rank: this rank within the group.
    """

    name: ExchangeName
    rank: int
    _said: Agreement
    _columns: Shard
    _specs: tuple[AccumulatorSpec, ...]
    _combine: Combine
    _group: ProcessGroup | None
    _comes_again: bool = False

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Rows of every rank's shard."""
        return self._said.row_counts

    @property
    def world_size(self) -> int:
        """Number of ranks that take part."""
        return len(self._said.row_counts)

    @property
    def total_rows(self) -> int:
        """Rows of all ranks together."""
        return self._said.total_rows

    @property
    def most_rows(self) -> int:
        """Most rows of one visit: of a rank, or of ranks whose shards are gathered."""
        if self.name == "node_gather":
            return max(widths(self.row_counts, self._said.ranks_per_node[0]))
        return self.total_rows if self.name == "all_gather" else self._said.most_rows

    @torch.no_grad()
    def run(self, visit: Visitor) -> Shard:
        """Bring all shards to ``visit``; return this rank's finished accumulators.

        Args:
            visit: called with the own shard alone first; then with those of other ranks, where
                shards are gathered with those of several consecutive ranks as one, named by the
                first of them.
        """
        if self._group is None or self.world_size == 1:
            mine = tuple(
                self._columns[0].new_empty((self.row_counts[0], *spec.row_shape), dtype=spec.dtype)
                for spec in self._specs
            )
            visit(self.rank, self._columns, mine)
            return mine
        transfers = transfers_of(self._group, self._columns[0].device)
        if transfers.limit_visits is not None:
            visit = transfers.limit_visits(visit)
        arguments = (self._columns, visit, self._specs)
        if self.name == "all_gather":
            return _visit_all(*arguments, self._combine, self.row_counts, transfers.group)
        add = COMBINE_IN_PLACE[self._combine]
        if self.name in ("two_level", "node_gather"):
            size, _ = self._said.ranks_per_node
            place = Place(self.rank, self.world_size // size, size)
            run = run_two_level if self.name == "two_level" else run_node_gather
            channels = transfers.channel, transfers.crossing
            return run(*arguments, add, self.row_counts, place, *channels)
        assert self.name in ("ring", "two_way")
        paths = ring_paths(self.name, self.rank, self.world_size)
        return run_ring(
            *arguments,
            add,
            self.row_counts,
            paths,
            transfers.channel,
            comes_again=self._comes_again,
        )


def _visit_all(
    columns: Shard,
    visit: Visitor,
    specs: Sequence[AccumulatorSpec],
    combine: Combine,
    row_counts: Sequence[int],
    transfer: ProcessGroup,
) -> Shard:
    """Gather every shard, visit them, and reduce-scatter the accumulators; the own shard first."""
    rank, world_size, longest = transfer.rank(), len(row_counts), max(row_counts)
    gathered = [gather_padded(column, longest, transfer) for column in columns]
    collected = [
        # Zeros: the padding rows of short shards are reduced too.
        columns[0].new_zeros((world_size, longest, *spec.row_shape), dtype=spec.dtype)
        for spec in specs
    ]
    # Without padding between them, the shards before and after the own one are one matrix each.
    stretches = [(rank, rank + 1), (0, rank), (rank + 1, world_size)]
    if len(set(row_counts)) > 1:
        stretches[1:] = [(other, other + 1) for other in range(world_size) if other != rank]
    for first, stop in stretches:
        rows = sum(row_counts[first:stop])
        if first < stop:
            visit(
                first,
                tuple(everyone[first:stop].flatten(0, 1)[:rows] for everyone in gathered),
                tuple(everyone[first:stop].flatten(0, 1)[:rows] for everyone in collected),
            )
    return tuple(
        reduce_scatter(everyone, combine, transfer)[: row_counts[rank]] for everyone in collected
    )


def prepare_exchange(
    columns: Sequence[Tensor],
    *,
    accumulators: Sequence[AccumulatorSpec] = (),
    combine: Combine = "sum",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    purpose: str = "",
    shared: Mapping[str, Tensor | float] | None = None,
    local_world_size: int | None = None,
    comes_again: bool = False,
) -> Exchange:
    """Agree with the other ranks on an exchange, whose ``run`` then calls a visitor.

    Distributed contract: a few short messages between CPUs if the group has several ranks, and one
    small all-gather if this differs from the last time on any of them. Numbers of rows may differ
    (0 too); dtypes, row shapes, accumulators and exchange must agree.

    Args:
        columns: this rank's shard: tensors with the same number of rows.
        accumulators: what each shard collects on its way; none by default.
        combine: how contributions of several ranks meet: their sum, their maximum, or the
            logarithm of the sum of their exponentials.
        exchange: see the module docstring.
        group: process group; the default group if None, a world of one without any.
        purpose: in readable words whatever else must be equal on all ranks (which loss, which
            gradients), its name before the first semicolon; differences are reported.
        shared: at most two numbers that must be equal up to rounding; those on a device are read
            at the first exchange of that name only.
        local_world_size: consecutive ranks of the group that share a node; None takes what
            ``set_local_world_size`` or the launcher said.
        comes_again: whether this pass is made at every step: a ring then keeps the memory of two
            shards and two accumulators until the next one.

    Raises:
        UserError: if the tensors of the shard differ in rows, the exchange is unknown or
            "local" in a group of several ranks, "two_level" or "node_gather" over nodes of
            different sizes, or ranks disagree (names the rank).
        RuntimeError: within the time limit of the group, if a rank does not take part; names
            what was waited for.
    """
    shard = tuple(column.detach().contiguous() for column in columns)
    num_rows = _rows_of(shard)
    if exchange not in get_args(ExchangeName):
        raise UserError(
            f"exchange ({exchange!r}) must be one of {', '.join(get_args(ExchangeName))}"
        )
    group = resolve_group(group)
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), group.size())
    if exchange == "local" and world_size > 1:
        raise UserError(
            f"exchange ('local') sees one rank but the group has {world_size}: the loss would "
            "miss every pair across ranks; use 'ring', 'all_gather' or 'auto', or pass a group "
            "of one rank"
        )
    specs = tuple(accumulators)
    said = Agreement((num_rows,), (1,), _UNMEASURED)
    if group is not None and world_size > 1:
        added = ", ".join(
            f"{str(spec.dtype).removeprefix('torch.')} {spec.row_shape}" for spec in specs
        )
        signature = (
            f"{describe_shard(shard)}; accumulators: {added or 'none'}; {exchange}, {combine}"
            + (f"; {purpose}" if purpose else "")
        )
        if local_world_size is None:
            local_world_size = local_world_size_of(group)
        control = control_of(group)
        numbers = read_numbers(shared or {}, purpose.partition(";")[0], control.compared)
        speeds = control.speeds_of(shard[0].device)
        said = control.handshake.agree(num_rows, local_world_size, signature, numbers, speeds)
    _, obstacle = said.ranks_per_node
    if exchange in ("two_level", "node_gather") and obstacle:
        raise UserError(
            f"exchange ({exchange!r}) needs nodes of equal size, but {obstacle}; pass "
            "local_world_size, call set_local_world_size, or use 'ring' or 'auto'"
        )
    name = _choose(exchange, said, shard, specs)
    return Exchange(name, rank, said, shard, specs, combine, group, comes_again)


def circulate(
    columns: Sequence[Tensor],
    visit: Visitor,
    *,
    accumulators: Sequence[AccumulatorSpec] = (),
    combine: Combine = "sum",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    local_world_size: int | None = None,
) -> Shard:
    """Bring the shard of every rank past this rank exactly once.

    Calls ``visit(owner, shard, contributions)`` with its own shard first, then with those of the
    others. ``owner`` is the group rank the shard came from; "all_gather" and "node_gather" bring
    those of several consecutive ranks as one, and ``owner`` is the first. ``visit`` must overwrite
    every ``contributions[k]``, of shape (rows of the shard, *row_shape), with what this rank adds
    to the shard's accumulator k.

    Distributed contract: collective over ``group``; every rank passes its own shard and gets the
    combined accumulators of its own rows. No autograd. The other arguments, and what is raised, are
    those of ``prepare_exchange``.

    Args:
        columns: this rank's shard: tensors with the same number of rows.
        visit: see above.
        accumulators: what travels home; none by default.
        combine: how contributions of several ranks meet.
        exchange: see the module docstring.
        group: process group; the default group if None, a world of one without any.
        local_world_size: consecutive ranks of the group that share a node.

    Returns:
        One tensor per accumulator, (rows of this rank, *row_shape).

    Example:
        >>> def visit(owner, shard, contributions):
        ...     contributions[0].copy_(shard[0].sum(dim=1))
        >>> spec = AccumulatorSpec((), torch.float32)
        >>> circulate([torch.ones(2, 3)], visit, accumulators=[spec])
        (tensor([3., 3.]),)
    """
    return prepare_exchange(
        columns,
        accumulators=accumulators,
        combine=combine,
        exchange=exchange,
        group=group,
        local_world_size=local_world_size,
    ).run(visit)


def agree_once(what: str, group: ProcessGroup | None = None) -> None:
    """Refuse ranks that do not do the same, the first time this one does it.

    Distributed contract: one small all-gather on the CPU at the first call with these words in a
    group, none later. A rank that says something else afterwards meets the others in their next
    exchange, where it is named.

    Args:
        what: settings that must be equal on all ranks and that no exchange mentions.
        group: process group; the default group if None.

    Raises:
        UserError: if ranks differ; names the odd ones.

    Example:
        >>> agree_once("weights 1.0 and 0.5")
    """
    group = resolve_group(group)
    if group is None or group.size() == 1 or what in control_of(group).compared:
        return
    prepare_exchange([torch.empty(0)], group=group, purpose=what)
    control_of(group).compared.add(what)


def _choose(
    exchange: ExchangeName,
    said: Agreement,
    shard: Shard,
    specs: tuple[AccumulatorSpec, ...],
) -> ExchangeName:
    """Resolve "auto" from what all ranks know, so that every rank chooses the same.

    The fastest by the cost model, of those whose memory is no matter.
    """
    if exchange != "auto":
        return exchange
    world_size = len(said.row_counts)
    if world_size == 1:
        return "local"
    rows = max(1, said.most_rows)
    width = max(1, math.prod(shard[0].shape[1:]))
    row_bytes = sum(math.prod(t.shape[1:]) * t.element_size() for t in shard)
    sum_bytes = sum(math.prod(spec.row_shape) * spec.dtype.itemsize for spec in specs)
    problem = Problem(
        local_batch_size=rows,
        embed_dim=width,
        feature_bytes=-(-row_bytes // width),
        accumulator_bytes=-(-sum_bytes // width),
    )
    return _fastest(world_size, *said.ranks_per_node, said.speeds, problem)


@lru_cache(maxsize=64)
def _fastest(
    world_size: int, per_node: int, obstacle: str, speeds: Speeds, problem: Problem
) -> RunName:
    """Ask the cost model, and say once per case what "auto" chose and why."""
    cluster = Cluster(
        world_size=world_size, local_world_size=per_node, **dataclasses.asdict(speeds)
    )
    shard_bytes = problem.shard_bytes + problem.shard_accumulator_bytes
    names: list[RunName] = ["ring", "two_way"]
    if 1 < per_node < world_size:
        names.insert(0, "two_level")
        if per_node * shard_bytes <= NODE_GATHER_LIMIT_BYTES:
            names.append("node_gather")
    if world_size * shard_bytes <= GATHER_LIMIT_BYTES:
        names.append("all_gather")
    seconds = {name: predict(name, cluster, problem).seconds for name in names}
    # Of equally fast ones the first: whose links have the most to spare, then the least memory.
    chosen = next(name for name in names if seconds[name] <= 1.02 * min(seconds.values()))
    nodes = world_size // per_node
    layout = obstacle or (
        f"{nodes} nodes of {per_node} ranks"
        if 1 < per_node < world_size
        else "one node"
        if per_node == world_size
        else "one rank per node as far as known"
    )
    others = ", ".join(
        f"{name} {_milliseconds(value)}" for name, value in seconds.items() if name != chosen
    )
    logger.info(
        "exchange auto -> %s (%s): %d ranks, %s per hop, %s if gathered (all_gather up to %s); "
        "predicted %s, %s",
        chosen,
        layout,
        world_size,
        _mib(shard_bytes),
        _mib(shard_bytes * world_size),
        _mib(GATHER_LIMIT_BYTES),
        _milliseconds(seconds[chosen]),
        others,
    )
    return chosen


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def _rows_of(shard: Shard) -> int:
    if not shard:
        raise UserError("columns must hold at least one tensor")
    counts = [tensor.shape[0] if tensor.ndim else -1 for tensor in shard]
    if len(set(counts)) > 1 or counts[0] < 0:
        raise UserError(
            f"columns must be tensors with the same number of rows; got {counts} "
            "(-1 means a tensor without rows)"
        )
    return counts[0]
