"""Do two dictionaries of features hold the same ones? Matched one to one, as well as possible.

With codes Z (N, F) and Y (N, G) of the same N things, not centred, the affinity of feature f and
feature g is sum_i Z[i, f] Y[i, g]. The Hungarian method finds the matching with the largest sum.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_LEAST_SHARE, _MOST_SHARE = 1e-5, 0.1  # of the rows a feature may be active in


class MatchedFeatures(NamedTuple):
    """How well the features of two dictionaries can be matched.

    Attributes:
        weighted: sum of the affinities of matched features / (|Z|_F |Y|_F).
        binary: the same of codes that only say whether a feature is active.
        first_features: features of the first side that were kept.
        second_features: likewise.
    """

    weighted: float
    binary: float
    first_features: int
    second_features: int


@torch.no_grad()
def match_features(
    code_parts: Iterable[tuple[Tensor, Tensor]], *, keep_common: bool = False
) -> MatchedFeatures:
    """Match the features of two dictionaries by their codes of the same things.

    Features that are active in 1e-5 of the rows or fewer, or in a tenth or more, are left out of
    affinities and norms.

    Args:
        code_parts: pairs of (B, F) and (B, G) non-negative codes, part after part of the rows.
        keep_common: keep all features that are ever active.

    Returns:
        Correlations in [0, 1]: 1 if the codes are equal up to the order of features and one
        factor; NaN if a side keeps no feature.

    Example:
        >>> codes = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
        >>> match_features([(codes, codes.flip(1))], keep_common=True).weighted
        1.0

    Source:
        BangachevKiril/L2PRH, metrics/sparse_feature_correlations.py and
        sae/sparse_feature_truncation.py.
    """
    sums: list[Tensor] = []
    num_rows = 0
    for first, second in code_parts:
        first, second = first.double(), second.double()
        active = (first > 0).double(), (second > 0).double()
        found = [
            first.T @ second,
            active[0].T @ active[1],
            first.square().sum(dim=0),
            second.square().sum(dim=0),
            active[0].sum(dim=0),
            active[1].sum(dim=0),
        ]
        num_rows += len(first)
        sums = found if not sums else [a + b for a, b in zip(sums, found, strict=True)]
    weighted, binary, *squares, first_counts, second_counts = (each.cpu().numpy() for each in sums)
    kept = [
        (counts > 0) & (keep_common | _is_kept(counts / num_rows))
        for counts in (first_counts, second_counts)
    ]
    return MatchedFeatures(
        _correlation(weighted, squares[0], squares[1], kept),
        _correlation(binary, first_counts, second_counts, kept),
        int(kept[0].sum()),
        int(kept[1].sum()),
    )


def _is_kept(shares: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (shares > _LEAST_SHARE) & (shares < _MOST_SHARE)


def _correlation(
    affinity: NDArray[np.float64],
    first_squares: NDArray[np.float64],
    second_squares: NDArray[np.float64],
    kept: list[NDArray[np.bool_]],
) -> float:
    """Affinity of the best matching over the product of the norms."""
    affinity = affinity[np.ix_(*kept)]
    if not affinity.size:
        return float("nan")
    rows, columns = linear_sum_assignment(affinity, maximize=True)
    norms = np.sqrt(first_squares[kept[0]].sum() * second_squares[kept[1]].sum())
    return float(affinity[rows, columns].sum() / norms)
