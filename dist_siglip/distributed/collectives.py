"""The few plain collectives the metrics need, which also work in a world of one."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed.groups import resolve_group
from dist_siglip.distributed.renamed import all_gather_single


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
