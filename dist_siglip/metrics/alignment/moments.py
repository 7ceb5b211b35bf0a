"""CKA and SVCCA: alignment of two sets of embeddings from their second moments over all ranks.

One pass over the rows finds the means, one the centred moments X'X, Y'Y and X'Y and sums of
products of squared lengths; memory is O((D + E)^2) whatever the number of rows. CKA is a function
of the Gram matrices K = X X' and L = Y Y' alone, so a rotation, a scale or a shift of one side
changes nothing. It is computed without them, from centred rows:

    tr(K H L H)          = |X'Y|_F^2
    <K~, L~>             = |X'Y|_F^2 - q         q = sum |x|^2 |y|^2        K~: diagonal set to 0
    1'K~1                = -a                    a = sum |x|^2              b = sum |y|^2
    1'K~ L~1             = q

SVCCA reduces each side to its strongest directions, the eigenvectors of X'X, and compares what
linear maps can make of them: the canonical correlations are the singular values of the whitened
cross-covariance, exact and without an iteration.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import gather_rows, resolve_group, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.metrics.rows import check_features, raise_together
from dist_siglip.metrics.tiles import row_slices

# HSIC is not defined for fewer.
LEAST_ROWS = 4
SVCCA_DIMENSIONS = 10
_ROUNDING = 1e-12  # share of the largest eigenvalue below which there is only rounding


class OwnRows(NamedTuple):
    """Positions of this rank's rows among those of all ranks, in rank order."""

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


def cka(moments: PairedMoments) -> float:
    """Centred kernel alignment with inner products as kernel, in [0, 1].

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))        HSIC(K, L) = tr(K H L H)

    with H = I - 11'/N. With few rows it is large even for independent sides, the larger the more
    dimensions they have; ``unbiased_cka`` is not.

    Args:
        moments: of both sides.

    Returns:
        1 for sides that are equal up to rotation, scale and shift; NaN if a side has no spread.

    Example:
        >>> import torch
        >>> from dist_siglip.metrics.alignment import collect_moments
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])
        >>> round(cka(collect_moments(rows, 5 * rows.flip(1) + 1)), 12)
        1.0

    Source:
        Kornblith et al. 2019, arXiv:1905.00414, equations 2 and 3. minyoungg/platonic-rep adds
        1e-6 to the root and BangachevKiril/L2PRH does not let its argument fall below 1e-6; here
        is neither.
    """
    cross, first, second = (
        float(block.square().sum()) for block in (moments.cross, moments.first, moments.second)
    )
    return _ratio(cross, first, second)


def unbiased_cka(moments: PairedMoments) -> float:
    """Centred kernel alignment from the unbiased estimate of HSIC; independent sides give about 0.

        HSIC_u(K, L) = 1 / (N (N - 3)) * ( <K~, L~'> + 1'K~1 1'L~1 / ((N - 1)(N - 2))
                                           - 2 / (N - 2) * 1'K~ L~1 )

    Args:
        moments: of both sides, with at least 4 rows.

    Returns:
        At most about 1, may be below 0; NaN if a side has no spread.

    Raises:
        UserError: for fewer than 4 rows.

    Example:
        >>> import torch
        >>> from dist_siglip.metrics.alignment import collect_moments
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])
        >>> round(unbiased_cka(collect_moments(rows, 5 * rows.flip(1) + 1)), 12)
        1.0

    Source:
        Song et al. 2012, "Feature selection via dependence maximization", equation 5; as
        unbiased_cka of minyoungg/platonic-rep, which adds 1e-6 to the root: with rows of length 1
        and D directions HSIC_u is about 1 / D, so that its values are lower by a share of 1e-6 D.
    """
    if moments.num_rows < LEAST_ROWS:
        raise UserError(
            f"unbiased CKA of {moments.num_rows} rows is not defined; give at least {LEAST_ROWS}"
        )
    first_trace, second_trace = float(moments.first.trace()), float(moments.second.trace())
    return _ratio(
        _unbiased_hsic(moments, moments.cross, moments.cross_norms, first_trace * second_trace),
        _unbiased_hsic(moments, moments.first, moments.first_norms, first_trace**2),
        _unbiased_hsic(moments, moments.second, moments.second_norms, second_trace**2),
    )


def _unbiased_hsic(moments: PairedMoments, block: Tensor, norms: float, traces: float) -> float:
    """HSIC_u by the identities of the module; ``traces`` is a b."""
    count = moments.num_rows
    total = (
        float(block.square().sum())
        - norms
        + traces / ((count - 1) * (count - 2))
        - 2 * norms / (count - 2)
    )
    return total / (count * (count - 3))


def _ratio(cross: float, first: float, second: float) -> float:
    product = first * second
    return cross / math.sqrt(product) if product > 0 else math.nan


def svcca(
    moments: PairedMoments, dimensions: int = SVCCA_DIMENSIONS, *, standardize: bool = True
) -> float:
    """Mean canonical correlation of the ``dimensions`` strongest directions of both sides.

    Args:
        moments: of both sides.
        dimensions: directions that are kept of each side; a side with less has fewer, and the mean
            is over the smaller number.
        standardize: True centres the rows and scales every coordinate to variance 1 before the
            directions are found. False takes the directions of the rows as they are, so that
            the first is mostly the mean, and centres only for the correlation.

    Returns:
        Mean in [0, 1]; NaN if a side has no spread.

    Raises:
        UserError: if ``dimensions`` is below 1.

    Example:
        >>> from dist_siglip.metrics.alignment import collect_moments
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])
        >>> round(svcca(collect_moments(rows, rows @ torch.tensor([[2.0, 1.0], [0.0, 3.0]]))), 12)
        1.0

    Source:
        Raghu et al. 2017, arXiv:1706.05806. ``standardize=True`` is svcca of
        minyoungg/platonic-rep, False that of BangachevKiril/L2PRH; both find the directions by a
        randomised decomposition and the correlations by an iteration. platonic-rep's decomposition
        (``svd_lowrank`` with q=10) differs from the exact one in the first digit: .74 for .898.
    """
    if dimensions < 1:
        raise UserError(f"dimensions ({dimensions}) of SVCCA must be at least 1; try 10")
    first = _whitened_directions(
        moments.first, moments.first_mean, moments.num_rows, dimensions, standardize
    )
    second = _whitened_directions(
        moments.second, moments.second_mean, moments.num_rows, dimensions, standardize
    )
    kept = min(first.shape[1], second.shape[1])
    if not kept:
        return math.nan
    correlations = torch.linalg.svdvals(first.T @ moments.cross.cpu() @ second)[:kept]
    return float(correlations.clamp(0, 1).mean())


def _whitened_directions(
    second_moment: Tensor, mean: Tensor, num_rows: int, dimensions: int, standardize: bool
) -> Tensor:
    """Maps (D, kept) that send centred rows to uncorrelated coordinates of squared length 1."""
    centered, mean = second_moment.cpu(), mean.cpu()
    if standardize:
        squares = centered.diagonal()
        varies = squares > _ROUNDING**2 * num_rows * mean.square()
        scale = torch.where(varies, squares.rsqrt(), 0)
        strongest = scale[:, None] * _strongest(scale[:, None] * centered * scale, dimensions)
    else:
        strongest = _strongest(centered + num_rows * mean.outer(mean), dimensions)
    values, vectors = _eigenpairs(strongest.T @ centered @ strongest)
    return strongest @ (vectors / values.sqrt())


def _strongest(matrix: Tensor, count: int) -> Tensor:
    """Eigenvectors (D, at most ``count``) of the largest eigenvalues."""
    return _eigenpairs(matrix)[1][:, -count:]


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues that are more than rounding, ascending, and their eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(matrix)
    present = (values > 0) & (values > _ROUNDING * values[-1:].sum())
    return values[present], vectors[:, present]
