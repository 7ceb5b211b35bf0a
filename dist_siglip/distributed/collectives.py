"""Plain collectives of the metrics, which also work in a world of one.

Fetching rows: a row's position is its number when the rows of all ranks stand in rank order. A rank
that knows positions asks their owners and gets rows; nobody holds the rows of everybody.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed.combine import all_gather_single
from dist_siglip.distributed.groups import resolve_group
from dist_siglip.errors import UserError


class HostCopy:
    """Copy of a tensor to the host, which does not wait for it before it reads.

    From CUDA it goes to pinned memory, behind what the stream has been told so far.

    Args:
        value: left as it is; what is written to it later does not show in the copy.

    Example:
        >>> HostCopy(torch.tensor(3.0)).read()
        tensor(3.)
    """

    def __init__(self, value: Tensor) -> None:
        is_cuda = value.device.type == "cuda"
        self._value = torch.empty_like(value, device="cpu", pin_memory=is_cuda)
        self._value.copy_(value, non_blocking=True)
        self._arrival: torch.cuda.Event | None = None
        if is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> Tensor:
        """Return the copy, once it is there."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._value


def sum_over_ranks(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Add ``values`` over all ranks, element by element.

    Distributed contract: one all-reduce; every rank passes the same shape and dtype and gets
    the same result. The argument is left as it is. No autograd.

    Example:
        >>> sum_over_ranks(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    return _reduce(values, dist.ReduceOp.SUM, group)


def max_over_ranks(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Take the maximum of ``values`` over all ranks, element by element.

    Distributed contract: as ``sum_over_ranks``.

    Example:
        >>> max_over_ranks(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    return _reduce(values, dist.ReduceOp.MAX, group)


def gather_rows(rows: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Concatenate the rows of all ranks in rank order, on every rank.

    Distributed contract: two all-gathers. Ranks may pass different numbers of rows (0 too);
    dtype and row shape must agree. No autograd.

    Args:
        rows: (rows of this rank, ...).
        group: process group; the default group if None.

    Returns:
        (rows of all ranks, ...).

    Example:
        >>> gather_rows(torch.tensor([[1, 2]]))
        tensor([[1, 2]])
    """
    group = resolve_group(group)
    if group is None or dist.get_world_size(group) == 1:
        return rows.detach().clone()
    world_size = dist.get_world_size(group)
    counts = torch.empty(world_size, dtype=torch.int64, device=rows.device)
    mine = torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device)
    all_gather_single(counts, mine, group=group)
    longest = int(counts.max())
    # Not every backend carries bool.
    carried = rows.detach().to(torch.uint8) if rows.dtype == torch.bool else rows.detach()
    everyone = gather_padded(carried, longest, group)
    parts = [part[:count] for part, count in zip(everyone, counts.tolist(), strict=True)]
    return torch.cat(parts).to(rows.dtype)


def gather_padded(rows: Tensor, longest: int, group: ProcessGroup) -> Tensor:
    """Gather the rows of all ranks, each part padded with zeros to ``longest`` rows.

    Args:
        rows: (rows of this rank, ...), at most ``longest``.
        longest: most rows any rank has.
        group: process group.

    Returns:
        (W, longest, ...).
    """
    padded = rows
    if rows.shape[0] < longest:
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
    world_size = dist.get_world_size(group)
    everyone = rows.new_empty((world_size * longest, *rows.shape[1:]))
    if longest:
        all_gather_single(everyone, padded.contiguous(), group=group)
    return everyone.view(world_size, longest, *rows.shape[1:])


@torch.no_grad()
def copy_from_first_rank(tensors: Iterable[Tensor], group: ProcessGroup | None = None) -> None:
    """Overwrite tensors with those of the first rank, in place.

    For what a rank changes on its own though all ranks should share it, such as the running
    statistics of BatchNorm, which see a rank's own batches.

    Distributed contract: one broadcast per tensor; every rank passes the same shapes and dtypes.

    Example:
        >>> statistics = torch.tensor([1.0])
        >>> copy_from_first_rank([statistics])
        >>> statistics
        tensor([1.])
    """
    group = resolve_group(group)
    if group is None or dist.get_world_size(group) == 1:
        return
    for tensor in tensors:
        dist.broadcast(tensor, group=group, group_src=0)


def _reduce(
    values: Tensor, operation: dist.ReduceOp.RedOpType, group: ProcessGroup | None
) -> Tensor:
    result = values.detach().clone()
    group = resolve_group(group)
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(result, op=operation, group=group)
    return result


@torch.no_grad()
def fetch_rows(
    columns: Sequence[Tensor], positions: Tensor, *, group: ProcessGroup | None = None
) -> tuple[Tensor, ...]:
    """Bring the rows with these positions from the ranks that hold them.

    Distributed contract: every rank passes its own rows and asks for any positions, any number of
    each (0 too). One ``gather_rows`` and one all-reduce of a few bytes, an all-to-all of counts
    and one of positions, and an all-to-all per column. A position that is asked for twice is sent
    twice. No autograd.

    Args:
        columns: tensors of (B, ...), one row for each row of this rank; at least one. B may
            differ between ranks; row shapes and dtypes must agree.
        positions: (Q,) int64, from 0 to the number of rows of all ranks - 1.
        group: process group; the default group if None.

    Returns:
        One tensor per column, (Q, ...), in the order of ``positions``.

    Raises:
        UserError: if a position is out of range on any rank; on every rank.

    Example:
        >>> fetch_rows([torch.tensor([[10], [11], [12]])], torch.tensor([2, 0]))
        (tensor([[12],
                [10]]),)
    """
    group = resolve_group(group)
    device = positions.device
    counts = gather_rows(torch.tensor([len(columns[0])], device=device), group)
    ends = counts.cumsum(0)
    total = int(ends[-1])
    outside = ((positions < 0) | (positions >= total)).any()
    if bool(max_over_ranks(outside.long(), group)):
        raise UserError(
            f"positions to fetch must be from 0 to {total - 1}, the rows of all ranks; "
            "ask for rows that exist"
        )
    if group is None or dist.get_world_size(group) == 1:
        return tuple(column.detach()[positions] for column in columns)
    owners = torch.searchsorted(ends, positions, right=True)
    order = owners.argsort(stable=True)
    local_rows = (positions - (ends - counts)[owners])[order]
    asked = torch.bincount(owners, minlength=len(counts))
    answered = torch.empty_like(asked)
    dist.all_to_all_single(answered, asked, group=group)
    here, there = asked.tolist(), answered.tolist()
    wanted = _swap(local_rows, here, there, group)
    back = order.argsort()
    return tuple(_swap(column.detach()[wanted], there, here, group)[back] for column in columns)


def _swap(rows: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    """Send the first ``send[0]`` rows to rank 0, and so on; return what came, in rank order."""
    # Not every backend carries bool.
    carried = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    received = carried.new_empty((sum(receive), *carried.shape[1:]))
    dist.all_to_all_single(received, carried.contiguous(), receive, send, group=group)
    return received.to(rows.dtype)
