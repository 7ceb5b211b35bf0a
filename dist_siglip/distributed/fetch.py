"""Which rank holds these rows, and how do they come here?

A row's position is its number when the rows of all ranks stand in rank order, rank 0's first. A
rank that knows positions asks their owners, and gets rows; nobody holds the rows of everybody.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed.collectives import gather_rows, max_over_ranks
from dist_siglip.distributed.groups import resolve_group
from dist_siglip.errors import UserError


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
