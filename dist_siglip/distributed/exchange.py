"""Which shard is where at which step: the exchanges, which know nothing of formulas.

An exchange brings the columns of every rank past this rank once. What is done with a shard is
the visitor's business; what a visitor adds to a shard's accumulators is combined over all ranks
and comes home to the rank that owns the shard.

    local       one rank: its own shard
    ring        see ``ring``; memory does not grow with the number of ranks
    all_gather  gather every shard, visit, reduce-scatter the accumulators: two collectives, no
                chain of hops, but memory and one buffer of all rows
    auto        local for one rank; ring for two ranks or when the gathered rows would be large;
                else all_gather
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed.groups import companions_of, resolve_group
from dist_siglip.distributed.handshake import agree_on_rows, describe_shard
from dist_siglip.distributed.ring import AccumulatorSpec, Shard, Visitor, circulate_ring
from dist_siglip.errors import UserError

logger = logging.getLogger(__name__)

ExchangeName = Literal["auto", "local", "all_gather", "ring"]
Combine = Literal["sum", "max", "logaddexp"]

# Below this many gathered bytes, two collectives beat a chain of hops (latency decides).
GATHER_LIMIT_BYTES = 64 * 2**20


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
        transfer = companions_of(self._group).transfer
        if self.name == "ring":
            add = _COMBINE_IN_PLACE[self._combine]
            return circulate_ring(self._columns, visit, self._specs, add, self.row_counts, transfer)
        return self._run_all_gather(visit, transfer)

    def _run_all_gather(self, visit: Visitor, transfer: ProcessGroup) -> Shard:
        longest = max(self.row_counts)
        gathered = [_gather_padded(column, longest, transfer) for column in self._columns]
        collected = [
            # Zeros: the padding rows of short shards are reduced too.
            self._columns[0].new_zeros(
                (self.world_size, longest, *spec.row_shape), dtype=spec.dtype
            )
            for spec in self._specs
        ]
        for step in range(self.world_size):
            owner = (self.rank - step) % self.world_size
            rows = self.row_counts[owner]
            visit(
                owner,
                tuple(everyone[owner, :rows] for everyone in gathered),
                tuple(everyone[owner, :rows] for everyone in collected),
            )
        rows = self.row_counts[self.rank]
        return tuple(_reduce_scatter(part, self._combine, transfer)[:rows] for part in collected)


def prepare_exchange(
    columns: Sequence[Tensor],
    *,
    accumulators: Sequence[AccumulatorSpec] = (),
    combine: Combine = "sum",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    purpose: str = "",
) -> Exchange:
    """Agree with the other ranks on what will travel; see ``circulate`` for the arguments.

    Distributed contract: one small all-gather on the CPU if the group has several ranks.
    ``purpose`` says in readable words whatever else must be equal on all ranks (which loss, which
    gradients); a difference is reported like one of shapes.
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
    row_counts: tuple[int, ...] = (num_rows,)
    if group is not None and world_size > 1:
        added = ", ".join(
            f"{str(spec.dtype).removeprefix('torch.')} {spec.row_shape}" for spec in specs
        )
        signature = (
            f"{describe_shard(shard)}; accumulators: {added or 'none'}; {exchange}, {combine}"
            + (f"; {purpose}" if purpose else "")
        )
        row_counts = agree_on_rows(num_rows, signature, companions_of(group).control)
    name = _choose(exchange, row_counts, shard, specs)
    return Exchange(name, rank, row_counts, shard, specs, combine, group)


def circulate(
    columns: Sequence[Tensor],
    visit: Visitor,
    *,
    accumulators: Sequence[AccumulatorSpec] = (),
    combine: Combine = "sum",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> Shard:
    """Bring the shard of every rank past this rank exactly once.

    Calls ``visit(owner, shard, contributions)`` once per rank, its own shard first. ``owner`` is
    the group rank the shard came from; ``visit`` must overwrite every ``contributions[k]``, of
    shape (rows of the shard, *row_shape), with what this rank adds to the shard's accumulator k.

    Distributed contract: collective over ``group``; every rank passes its own shard and gets the
    combined accumulators of its own rows. Numbers of rows may differ (0 too); dtypes, row shapes,
    accumulators and exchange must agree. No autograd.

    Args:
        columns: this rank's shard: tensors with the same number of rows.
        visit: see above.
        accumulators: what travels home; none by default.
        combine: how contributions of several ranks meet: their sum, their maximum, or the
            logarithm of the sum of their exponentials.
        exchange: see the module docstring.
        group: process group; the default group if None, a world of one without any.

    Returns:
        One tensor per accumulator, (rows of this rank, *row_shape).

    Raises:
        UserError: if the tensors of the shard differ in rows, the exchange is unknown or
            "local" in a group of several ranks, or ranks disagree (names the rank).

    Example:
        >>> def visit(owner, shard, contributions):
        ...     contributions[0].copy_(shard[0].sum(dim=1))
        >>> spec = AccumulatorSpec((), torch.float32)
        >>> circulate([torch.ones(2, 3)], visit, accumulators=[spec])
        (tensor([3., 3.]),)
    """
    return prepare_exchange(
        columns, accumulators=accumulators, combine=combine, exchange=exchange, group=group
    ).run(visit)


def _choose(
    exchange: ExchangeName,
    row_counts: tuple[int, ...],
    shard: Shard,
    specs: tuple[AccumulatorSpec, ...],
) -> ExchangeName:
    """Resolve "auto" from sizes alone, so that every rank chooses the same."""
    if exchange != "auto":
        return exchange
    if len(row_counts) == 1:
        return "local"
    row_bytes = sum(math.prod(t.shape[1:]) * t.element_size() for t in shard)
    row_bytes += sum(math.prod(spec.row_shape) * spec.dtype.itemsize for spec in specs)
    gathered_bytes = row_bytes * max(row_counts) * len(row_counts)
    chosen: ExchangeName = (
        "ring" if len(row_counts) == 2 or gathered_bytes > GATHER_LIMIT_BYTES else "all_gather"
    )
    _log_choice(chosen, len(row_counts), round(gathered_bytes / 2**20))
    return chosen


@lru_cache(maxsize=64)
def _log_choice(chosen: ExchangeName, world_size: int, gathered_mib: int) -> None:
    """Say once per case what "auto" chose and why."""
    logger.info(
        "exchange auto -> %s: %d ranks, %d MiB if gathered (limit %d MiB)",
        chosen,
        world_size,
        gathered_mib,
        GATHER_LIMIT_BYTES // 2**20,
    )


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


def _gather_padded(column: Tensor, longest: int, transfer: ProcessGroup) -> Tensor:
    padded = column
    if column.shape[0] < longest:
        padded = column.new_zeros((longest, *column.shape[1:]))
        padded[: column.shape[0]] = column
    world_size = transfer.size()
    everyone = column.new_empty((world_size * longest, *column.shape[1:]))
    if longest:
        dist.all_gather_into_tensor(everyone, padded, group=transfer)
    return everyone.view(world_size, longest, *column.shape[1:])


def _add_(mine: Tensor, theirs: Tensor) -> None:
    mine.add_(theirs)


def _maximum_(mine: Tensor, theirs: Tensor) -> None:
    torch.maximum(mine, theirs, out=mine)


def _logaddexp_(mine: Tensor, theirs: Tensor) -> None:
    torch.logaddexp(mine, theirs, out=mine)


_COMBINE_IN_PLACE: dict[Combine, Callable[[Tensor, Tensor], None]] = {
    "sum": _add_,
    "max": _maximum_,
    "logaddexp": _logaddexp_,
}


def _reduce_scatter(everyone: Tensor, combine: Combine, transfer: ProcessGroup) -> Tensor:
    """Combine (ranks, rows, ...) over all ranks; each rank gets its own (rows, ...)."""
    mine = torch.empty_like(everyone[0])
    if not mine.numel():
        return mine
    flat = everyone.flatten(0, 1)
    if combine == "logaddexp":
        # No backend reduces by it; what the ranks say about my rows comes here, the same bytes.
        received = torch.empty_like(everyone)
        dist.all_to_all_single(received.flatten(0, 1), flat, group=transfer)
        return torch.logsumexp(received, dim=0)
    operation = dist.ReduceOp.SUM if combine == "sum" else dist.ReduceOp.MAX
    dist.reduce_scatter_tensor(mine, flat, op=operation, group=transfer)
    return mine
