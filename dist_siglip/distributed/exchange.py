"""Exchanges: how the shard of every rank passes this one. They know nothing of formulas.

An exchange brings the columns of every rank past this rank once. What is done with a shard is
the visitor's business; what a visitor adds to a shard's accumulators is combined over all ranks
and comes home to the rank that owns the shard.

    local       one rank: its own shard
    ring        every rank sends to the next one; memory does not grow with the number of ranks
    two_way     shards travel both ways for half the distance: half the steps, twice the buffers
    two_level   a ring inside each node, then one hop to the next node, all ranks of a node at
                once: every network card works, where a ring uses one per node
    all_gather  gather every shard, visit, reduce-scatter the accumulators: two collectives, no
                chain of hops, but memory for the rows of all ranks
    auto        chosen from sizes and nodes, see ``_choose``; the reason is logged once

``ring_schedule`` says which way shards go, ``ring`` carries them, ``world`` knows the nodes.
All give the same numbers up to the order of the sums.
"""

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
from dist_siglip.distributed.groups import control_of, resolve_group, transfers_of
from dist_siglip.distributed.handshake import Agreement, agree, describe_shard, read_numbers
from dist_siglip.distributed.ring import AccumulatorSpec, Shard, Visitor, run_ring
from dist_siglip.distributed.ring_schedule import ring_paths
from dist_siglip.distributed.world import local_world_size_of
from dist_siglip.errors import UserError

logger = logging.getLogger(__name__)

ExchangeName = Literal["auto", "local", "all_gather", "ring", "two_way", "two_level"]

# Below this many gathered bytes, two collectives beat a chain of hops (latency decides).
GATHER_LIMIT_BYTES = 64 * 2**20
# Below this many bytes per hop latency decides, and half the steps are worth twice the buffers.
TWO_WAY_LIMIT_BYTES = 2**20


@dataclass(frozen=True)
class Exchange:
    """An exchange whose ranks have agreed on what they send; ``run`` may be called once.

    Attributes:
        name: the exchange in use, never "auto".
        rank: this rank within the group.
        row_counts: rows of every rank's shard.
    """

    name: ExchangeName
    rank: int
    row_counts: tuple[int, ...]
    _columns: Shard
    _specs: tuple[AccumulatorSpec, ...]
    _combine: Combine
    _group: ProcessGroup | None
    _local_world_size: int
    _comes_again: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks that take part."""
        return len(self.row_counts)

    @property
    def total_rows(self) -> int:
        """Rows of all ranks together."""
        return sum(self.row_counts)

    @torch.no_grad()
    def run(self, visit: Visitor) -> Shard:
        """Call ``visit`` once per rank's shard; return this rank's finished accumulators."""
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
        assert self.name in ("ring", "two_way", "two_level")
        paths = ring_paths(self.name, self.rank, self.world_size, self._local_world_size)
        add = COMBINE_IN_PLACE[self._combine]
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

    Distributed contract: one small all-gather on the CPU if the group has several ranks. Numbers of
    rows may differ (0 too); dtypes, row shapes, accumulators and exchange must agree.

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
            "local" in a group of several ranks, "two_level" over nodes of different sizes, or
            ranks disagree (names the rank).
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
    said = Agreement((num_rows,), (1,))
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
        said = agree(num_rows, local_world_size, signature, control.announce, numbers)
    per_node, obstacle = _ranks_per_node(said.local_world_sizes)
    if exchange == "two_level" and obstacle:
        raise UserError(
            f"exchange ('two_level') needs nodes of equal size, but {obstacle}; pass "
            "local_world_size, call set_local_world_size, or use 'ring' or 'auto'"
        )
    name = _choose(exchange, said.row_counts, shard, specs, per_node, obstacle)
    return Exchange(
        name, rank, said.row_counts, shard, specs, combine, group, per_node, comes_again
    )


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

    Calls ``visit(owner, shard, contributions)`` once per rank, its own shard first. ``owner`` is
    the group rank the shard came from; ``visit`` must overwrite every ``contributions[k]``, of
    shape (rows of the shard, *row_shape), with what this rank adds to the shard's accumulator k.

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


def _ranks_per_node(sizes: tuple[int, ...]) -> tuple[int, str]:
    """Return the ranks per node all ranks agree on, or 1 and what stands against it."""
    world_size, usual = len(sizes), max(set(sizes), key=sizes.count)
    odd = [rank for rank, size in enumerate(sizes) if size != usual]
    if odd:
        return 1, (
            f"rank {odd[0]} counts {sizes[odd[0]]} ranks on its node and rank "
            f"{sizes.index(usual)} counts {usual}"
        )
    if usual == 0:
        return 1, "the ranks of a node do not follow one another or nodes hold different numbers"
    if world_size % usual:
        return 1, f"{world_size} ranks are not whole nodes of {usual}"
    return usual, ""


def _choose(
    exchange: ExchangeName,
    row_counts: tuple[int, ...],
    shard: Shard,
    specs: tuple[AccumulatorSpec, ...],
    per_node: int,
    obstacle: str,
) -> ExchangeName:
    """Resolve "auto" from what all ranks know, so that every rank chooses the same.

    Gathering when the rows of all ranks are small; else two_level over several nodes of several
    ranks; else two_way when a hop is so small that latency decides; else ring.
    """
    if exchange != "auto":
        return exchange
    world_size = len(row_counts)
    if world_size == 1:
        return "local"
    row_bytes = sum(math.prod(t.shape[1:]) * t.element_size() for t in shard)
    row_bytes += sum(math.prod(spec.row_shape) * spec.dtype.itemsize for spec in specs)
    hop_bytes = row_bytes * max(row_counts)
    chosen: ExchangeName
    if world_size == 2:
        chosen, reason = "ring", "one hop either way"
    elif hop_bytes * world_size <= GATHER_LIMIT_BYTES:
        chosen, reason = "all_gather", "small enough to gather"
    elif 1 < per_node < world_size:
        chosen, reason = "two_level", f"{world_size // per_node} nodes of {per_node} ranks"
    else:
        chosen, reason = (
            "ring",
            obstacle
            or ("one node" if per_node == world_size else "one rank per node as far as known"),
        )
        if hop_bytes <= TWO_WAY_LIMIT_BYTES:
            chosen, reason = "two_way", f"{reason}, small hops"
    _log_choice(
        f"exchange auto -> {chosen} ({reason}): {world_size} ranks, {_mib(hop_bytes)} per hop "
        f"(two_way up to {_mib(TWO_WAY_LIMIT_BYTES)}), {_mib(hop_bytes * world_size)} if gathered "
        f"(all_gather up to {_mib(GATHER_LIMIT_BYTES)})"
    )
    return chosen


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


@lru_cache(maxsize=64)
def _log_choice(choice: str) -> None:
    """Say once per case what "auto" chose and why."""
    logger.info("%s", choice)


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
