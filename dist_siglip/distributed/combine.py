"""Combination of what several ranks add to one accumulator: in place, or by one collective."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.14 renames these two and warns of the old names.
_RENAMED = hasattr(dist, "all_gather_single") and hasattr(dist, "reduce_scatter_single")
all_gather_single = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
reduce_scatter_single = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor


Combine = Literal["sum", "max", "logaddexp"]


def _add_(mine: Tensor, theirs: Tensor) -> None:
    mine.add_(theirs)


def _maximum_(mine: Tensor, theirs: Tensor) -> None:
    torch.maximum(mine, theirs, out=mine)


def _logaddexp_(mine: Tensor, theirs: Tensor) -> None:
    torch.logaddexp(mine, theirs, out=mine)


COMBINE_IN_PLACE: dict[Combine, Callable[[Tensor, Tensor], None]] = {
    "sum": _add_,
    "max": _maximum_,
    "logaddexp": _logaddexp_,
}


def reduce_scatter(everyone: Tensor, combine: Combine, transfer: ProcessGroup) -> Tensor:
    """Combine (ranks, rows, ...) over all ranks; each rank gets its own (rows, ...).

    Distributed contract: one reduce-scatter; for "logaddexp" one all-to-all of the same bytes.
    """
    mine = torch.empty_like(everyone[0])
    if not mine.numel():
        return mine
    flat = everyone.flatten(0, 1)
    if combine == "logaddexp":
        # No backend reduces by it; what the ranks say about my rows comes here.
        received = torch.empty_like(everyone)
        dist.all_to_all_single(received.flatten(0, 1), flat, group=transfer)
        return torch.logsumexp(received, dim=0)
    operation = dist.ReduceOp.SUM if combine == "sum" else dist.ReduceOp.MAX
    reduce_scatter_single(mine, flat, op=operation, group=transfer)
    return mine
