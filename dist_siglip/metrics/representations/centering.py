"""What is left of embeddings when what they all share is taken away?

Embeddings of one model lie in a cone; its axis says which model it was and nothing about the
things embedded. The mean is that of the whole data set, so it is computed before rows are chosen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import sum_over_ranks
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
