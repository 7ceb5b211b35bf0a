"""Means and second moments of two sets of embeddings over the rows of all ranks.

All linear measures of alignment follow from the centred second moments X'X, Y'Y and X'Y and sums
of products of squared lengths: one pass over the rows for the means, one for the rest, and memory
of O((D + E)^2) whatever the number of rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import gather_rows, resolve_group, sum_over_ranks
from dist_siglip.metrics.checks import check_features, raise_together
from dist_siglip.metrics.tiles import row_slices

# HSIC is not defined for fewer.
LEAST_ROWS = 4


class OwnRows(NamedTuple):
    """Positions of this rank's rows among those of all ranks, in rank order.

    Attributes:
        start: position of the first.
        stop: position behind the last.
        num_rows: of all ranks.
    """

    start: int
    stop: int
    num_rows: int


def check_pairs(
    first_features: Tensor, second_features: Tensor, *, group: ProcessGroup | None = None
) -> OwnRows:
    """Raise for sides that cannot be compared; return the positions of this rank's rows.

    Distributed contract: a few small gathers; every rank raises the same error or none does.

    Raises:
        UserError: if features are not finite (names row and rank), the sides differ in length, or
            no rank has any row.
    """
    # One call each, since the sides may differ in width.
    for name, side in (("first_features", first_features), ("second_features", second_features)):
        check_features([(name, side)], unit_norm=False, group=group)
    device = first_features.device
    lengths = len(first_features), len(second_features)
    problem = None
    if lengths[0] != lengths[1]:
        problem = (
            f"first_features has {lengths[0]} rows and second_features {lengths[1]}; row i of both "
            "must belong to the same thing"
        )
    raise_together(problem, device=device, group=group)
    counts = gather_rows(torch.tensor([lengths[0]], device=device), group)
    if not counts.any():
        problem = f"there are no rows to compare; give at least {LEAST_ROWS}"
    raise_together(problem, device=device, group=group)
    resolved = resolve_group(group)
    rank = 0 if resolved is None else resolved.rank()
    start = int(counts[:rank].sum())
    return OwnRows(start, start + lengths[0], int(counts.sum()))


@torch.no_grad()
def mean_direction(features: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """Mean of the L2-normalised rows of all ranks, which is not normalised itself.

    Embeddings of one model lie in a cone; its axis says which model it was and nothing about the
    things embedded.

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
    for rows in row_slices(len(features)):
        total[:-1] += F.normalize(features[rows].double(), dim=1).sum(dim=0)
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
    for rows in row_slices(len(first_features)):
        x, y = (
            side[rows].double() - mean
            for side, mean in zip(sides, (first_mean, second_mean), strict=True)
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
    for rows in row_slices(len(features)):
        total += features[rows].double().sum(dim=0)
    return total
