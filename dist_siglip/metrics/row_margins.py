"""By how much is each row's own match ahead, when every row may have a threshold of its own?

    margin of row i = (min over its positives of s_ij - max over its negatives of s_ij) / 2

Retrieval asks for no more: a row finds its match exactly if its margin is above 0. Softmax losses
are content with that, while the sigmoid loss wants one threshold for all rows (``constellation``),
so the smallest of these is never below the global margin.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import max_over_ranks, sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class RowMargins:
    """Margins of the rows of one modality, half gaps as in ``constellation``.

    Attributes:
        count: rows of all ranks that have a positive and a negative pair.
        minimum: smallest margin; NaN without such rows.
        mean: mean margin; NaN without such rows.
    """

    count: int
    minimum: float
    mean: float


def no_row_ends(num_rows: int, device: torch.device) -> Tensor:
    """Ends of rows of which nothing was seen yet: (rows, 2) float64 of -inf.

    Column 0 is the largest negative cosine, column 1 minus the smallest positive one.

    Example:
        >>> no_row_ends(1, torch.device("cpu"))
        tensor([[-inf, -inf]], dtype=torch.float64)
    """
    return torch.full((num_rows, 2), -torch.inf, dtype=torch.float64, device=device)


def widen_row_ends(
    cosines: Tensor, is_positive: Tensor | None, row_ends: Tensor, column_ends: Tensor
) -> None:
    """Take a rectangle of cosines into the ends of its rows and of its columns, in place.

    Args:
        cosines: (R, C) float64.
        is_positive: (R, C) bool; None if no pair is.
        row_ends: (R, 2), as in ``no_row_ends``.
        column_ends: (C, 2).

    Example:
        >>> rows, columns = (no_row_ends(1, torch.device("cpu")) for _ in range(2))
        >>> widen_row_ends(torch.tensor([[0.5]], dtype=torch.float64), None, rows, columns)
        >>> rows.tolist(), columns.tolist()
        ([[0.5, -inf]], [[0.5, -inf]])
    """
    negative = cosines if is_positive is None else cosines.masked_fill(is_positive, -torch.inf)
    for dim, ends in ((1, row_ends), (0, column_ends)):
        torch.maximum(ends[:, 0], negative.amax(dim=dim), out=ends[:, 0])
    if is_positive is None:
        return
    positive = (-cosines).masked_fill_(~is_positive, -torch.inf)
    for dim, ends in ((1, row_ends), (0, column_ends)):
        torch.maximum(ends[:, 1], positive.amax(dim=dim), out=ends[:, 1])


def summarise_rows(row_ends: Tensor, group: ProcessGroup | None = None) -> RowMargins:
    """Turn the ends of this rank's rows into margins of the rows of all ranks.

    Distributed contract: two all-reduces; every rank gets the same result.

    Args:
        row_ends: (B, 2), as in ``no_row_ends``.
        group: process group.

    Example:
        >>> summarise_rows(torch.tensor([[0.2, -0.6], [0.4, -0.6]], dtype=torch.float64)).count
        2
    """
    margins = -row_ends.sum(dim=1) / 2
    margins = margins[torch.isfinite(margins)]
    sums = torch.stack([margins.new_tensor(len(margins)), margins.sum()])
    count, total = sum_over_ranks(sums, group).tolist()
    smallest = (-margins).max() if len(margins) else margins.new_tensor(-torch.inf)
    minimum = -float(max_over_ranks(smallest, group))
    if not count:
        return RowMargins(count=0, minimum=math.nan, mean=math.nan)
    return RowMargins(count=int(count), minimum=minimum, mean=total / count)
