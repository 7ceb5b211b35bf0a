"""Do the strongest directions of two sets of embeddings carry the same signals?

Each side is reduced to its strongest directions by a singular value decomposition; what linear maps
can make of them is compared by canonical correlation. Both steps need second moments alone: the
directions are eigenvectors of X'X, and canonical correlations the singular values of the
whitened cross-covariance, exactly, without an iteration that could fail to converge.
"""

import math

import torch
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.metrics.representations.moments import PairedMoments

_ROUNDING = 1e-12  # share of the largest that is none of the data


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
        >>> from dist_siglip.metrics.representations import collect_moments
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
