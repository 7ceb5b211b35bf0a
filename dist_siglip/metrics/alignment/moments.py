"""Which sums of two sets of embeddings does everything linear need?

With the mean of all rows taken away, x_i in R^D and y_i in R^E: the second moments X'X, Y'Y and
X'Y, and sums of products of squared lengths. No N x N matrix: one pass for the means, one for the
rest, and memory of O((D + E)^2) whatever the number of rows.

What is left of embeddings when what they all share is taken away?

Embeddings of one model lie in a cone; its axis says which model it was and nothing about the
things embedded. The mean is that of the whole data set, so it is computed before rows are chosen.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import sum_over_ranks
from dist_siglip.metrics.alignment.pairs import check_pairs
from dist_siglip.metrics.checks import check_features

_CHUNK_ROWS = 8192  # rows in float64 at a time


@torch.no_grad()
def mean_direction(features: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """Mean of the L2-normalised rows of all ranks, which is not normalised itself.

    Distributed contract: every rank passes its own rows, any number of them; every rank gets the
    same mean. One all-reduce of D + 1 numbers.

    Args:
        features: (B, D), finite.
        group: process group.

    Returns:
        (D,) float64; NaN if no rank has any row.

    Raises:
        UserError: if features are not finite; on every rank.

    Example:
        >>> mean_direction(torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    check_features([("features", features)], unit_norm=False, group=group)
    total = features.new_zeros(features.shape[1] + 1, dtype=torch.float64)
    for rows in features.split(_CHUNK_ROWS):
        total[:-1] += F.normalize(rows.double(), dim=1).sum(dim=0)
    total[-1] = len(features)
    total = sum_over_ranks(total, group)
    return total[:-1] / total[-1]


def center_normalize(features: Tensor, mean: Tensor) -> Tensor:
    """Normalise rows, take their mean away, and normalise what is left.

        x <- x / |x|        x <- x - mean        x <- x / |x|

    Args:
        features: (B, D).
        mean: (D,), that of ``mean_direction`` of the whole data set.

    Returns:
        (B, D) float64 rows of length 1; a row that equals the mean stays zero.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> center_normalize(rows, mean_direction(rows)).round(decimals=4)
        tensor([[ 0.7071, -0.7071],
                [-0.7071,  0.7071]], dtype=torch.float64)

    Source:
        Bangachev, Bresler and Polyanskiy 2026, arXiv:2605.28870, code BangachevKiril/L2PRH,
        get_data/center_embeddings.py.
    """
    return F.normalize(F.normalize(features.double(), dim=1) - mean, dim=1)


class PairedMoments(NamedTuple):
    """Sums over the N rows of all ranks, in float64; x and y are centred.

    Attributes:
        num_rows: N.
        first_mean: (D,) mean of the first side before centring.
        second_mean: (E,).
        first: (D, D) sum of x x'.
        second: (E, E) sum of y y'.
        cross: (D, E) sum of x y'.
        first_norms: sum of |x|^2 |x|^2.
        second_norms: sum of |y|^2 |y|^2.
        cross_norms: sum of |x|^2 |y|^2.
    """

    num_rows: int
    first_mean: Tensor
    second_mean: Tensor
    first: Tensor
    second: Tensor
    cross: Tensor
    first_norms: float
    second_norms: float
    cross_norms: float


@torch.no_grad()
def collect_moments(
    first_features: Tensor, second_features: Tensor, *, group: ProcessGroup | None = None
) -> PairedMoments:
    """Sum what ``cka``, ``unbiased_cka`` and ``svcca`` need over the rows of all ranks.

    Distributed contract: every rank passes its own rows, any number of them (0 too); the result is
    that of all rows and equal on every rank. Two all-reduces, of D + E and of about (D + E)^2
    numbers.

    Args:
        first_features: (B, D), finite.
        second_features: (B, E), finite; row i belongs to row i of the first side.
        group: process group.

    Raises:
        UserError: if features are not finite (names row and rank), the sides differ in length, or
            no rank has any row; on every rank.

    Example:
        >>> moments = collect_moments(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [4.0]]))
        >>> moments.num_rows, float(moments.first), float(moments.cross)
        (2, 2.0, 4.0)
    """
    num_rows = check_pairs(first_features, second_features, group=group).num_rows
    device = first_features.device
    sides = first_features, second_features
    widths = [side.shape[1] for side in sides]
    sums = torch.cat([_sum_rows(side) for side in sides])
    first_mean, second_mean = (sum_over_ranks(sums, group) / num_rows).split(widths)
    blocks = [
        torch.zeros(rows, columns, dtype=torch.float64, device=device)
        for rows, columns in ((widths[0], widths[0]), (widths[1], widths[1]), widths)
    ]
    norms = torch.zeros(3, dtype=torch.float64, device=device)
    for parts in zip(*(side.split(_CHUNK_ROWS) for side in sides), strict=True):
        x, y = (
            part.double() - mean
            for part, mean in zip(parts, (first_mean, second_mean), strict=True)
        )
        for block, left, right in zip(blocks, (x, y, x), (x, y, y), strict=True):
            block.addmm_(left.T, right)
        squares = x.square().sum(dim=1), y.square().sum(dim=1)
        norms += torch.stack(
            [squares[0] @ squares[0], squares[1] @ squares[1], squares[0] @ squares[1]]
        )
    flat = sum_over_ranks(torch.cat([*(block.flatten() for block in blocks), norms]), group)
    *summed, norms = flat.split([*(block.numel() for block in blocks), 3])
    first, second, cross = (part.view_as(block) for part, block in zip(summed, blocks, strict=True))
    first_norms, second_norms, cross_norms = norms.tolist()
    return PairedMoments(
        num_rows=num_rows,
        first_mean=first_mean,
        second_mean=second_mean,
        first=first,
        second=second,
        cross=cross,
        first_norms=first_norms,
        second_norms=second_norms,
        cross_norms=cross_norms,
    )


def _sum_rows(features: Tensor) -> Tensor:
    total = features.new_zeros(features.shape[1], dtype=torch.float64)
    for rows in features.split(_CHUNK_ROWS):
        total += rows.double().sum(dim=0)
    return total
