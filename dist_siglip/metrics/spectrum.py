"""How is the variance of a modality's embeddings spread over principal components?"""

import math

import torch
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.metrics.moments import Moments


def explained_variance_ratios(moments: Moments) -> Tensor:
    """Share of the variance in every principal component, largest first.

        eigenvalues of sum_i (x_i - mean x) (x_i - mean x)^T, divided by their sum

    Args:
        moments: of all rows.

    Returns:
        (D,) float64, adding up to 1; NaN without any variance.

    Example:
        >>> from dist_siglip.metrics.moments import collect_moments
        >>> rows = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> explained_variance_ratios(collect_moments(rows)).tolist()
        [0.8, 0.2]

    Source:
        Fahim et al. 2024, arXiv:2405.18570: ``explained_variance_ratio_`` of scikit-learn's PCA.
    """
    mean = moments.total / max(1, moments.num_rows)
    scatter = moments.products - torch.outer(moments.total, mean)
    variances = torch.linalg.eigvalsh(scatter).flip(0).clamp_min(0)
    total = variances.sum()
    # What rounding leaves of rows that are all one point is no variance.
    if not total > 1e-12 * moments.products.trace():
        return torch.full_like(variances, math.nan)
    return variances / total


def components_for(ratios: Tensor, share: float) -> float:
    """Fewest principal components that hold a share of the variance.

    Args:
        ratios: (D,) of ``explained_variance_ratios``.
        share: in (0, 1].

    Returns:
        A whole number from 1 to D; NaN without any variance.

    Raises:
        UserError: if the share is outside of (0, 1].

    Example:
        >>> components_for(torch.tensor([0.7, 0.2, 0.1]), 0.8)
        2.0
    """
    if not 0 < share <= 1:
        raise UserError(f"share ({share}) of the variance must be in (0, 1]; try 0.8")
    if ratios.isnan().any():
        return math.nan
    # Sums of shares may miss a round number by a rounding.
    reached = ratios.cumsum(0) >= share - 1e-12
    return float(len(ratios) - int(reached.sum()) + 1)
