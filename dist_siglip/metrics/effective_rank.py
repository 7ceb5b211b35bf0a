"""In how many directions do the embeddings of a modality spread?"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.metrics.moments import Moments, collect_moments

# Eigenvalues of sums of products are known up to this share of the largest.
_ROUNDING = 1e-14


@torch.no_grad()
def effective_rank(features: Tensor, *, group: ProcessGroup | None = None) -> float:
    """Exponential of the entropy of the normalised singular values of all ranks' features.

        p_k = s_k / sum_j s_j        effective rank = exp(-sum_k p_k log p_k)

    with s_k the singular values of the (N, D) matrix of features, which are not centred. It is
    between 1 (all on one line) and min(N, D); a model that collapses loses it.

    Distributed contract: every rank passes its own rows, any number of them; the result is that of
    all rows and equal on every rank. One all-reduce of (D + 1, D + 1).

    Args:
        features: (B, D), finite.
        group: process group.

    Raises:
        UserError: if features are not finite; on every rank.

    Example:
        >>> round(effective_rank(torch.eye(3)), 6), round(effective_rank(torch.ones(3, 2)), 6)
        (3.0, 1.0)

    Source:
        Roy and Vetterli 2007, "The effective rank"; Garrido et al. 2023, arXiv:2210.02885,
        equation 1 (RankMe), without its epsilon.
    """
    return rank_of_moments(collect_moments(features, group=group))


def rank_of_moments(moments: Moments) -> float:
    """Effective rank of the rows whose moments these are; see ``effective_rank``.

    Args:
        moments: of all rows.

    Example:
        >>> round(rank_of_moments(collect_moments(torch.eye(3))), 6)
        3.0
    """
    # N rows have at most N singular values above 0; the root of what rounding makes of the others
    # would count, thousands of them by 1e-8 each.
    squares = torch.linalg.eigvalsh(moments.products)[-max(moments.num_rows, 1) :]
    is_there = squares > _ROUNDING * squares[-1]
    singular = torch.where(is_there, squares, 0).sqrt()
    shares = singular / singular.sum()
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))
