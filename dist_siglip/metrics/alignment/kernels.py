"""CKA and SVCCA: alignment of two sets of embeddings from their second moments.

CKA is a function of the Gram matrices K = X X' and L = Y Y' alone, so a rotation, a scale or a
shift of one side changes nothing. It is computed without them, from centred rows:

    tr(K H L H)          = |X'Y|_F^2
    <K~, L~>             = |X'Y|_F^2 - q         q = sum |x|^2 |y|^2        K~: diagonal set to 0
    1'K~1                = -a                    a = sum |x|^2              b = sum |y|^2
    1'K~ L~1             = q

SVCCA reduces each side to its strongest directions, the eigenvectors of X'X, and compares what
linear maps can make of them: the canonical correlations are the singular values of the whitened
cross-covariance, exact and without an iteration.
"""

import math

import torch
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.metrics.alignment.moments import LEAST_ROWS, PairedMoments

_ROUNDING = 1e-12  # share of the largest eigenvalue below which there is only rounding


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


def svcca(moments: PairedMoments, dimensions: int = 10, *, standardize: bool = True) -> float:
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
