"""How well do two sets of embeddings agree, by all measures at once?"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.metrics.representations.kernel_alignment import cka, unbiased_cka
from dist_siglip.metrics.representations.moments import collect_moments
from dist_siglip.metrics.representations.neighborhoods import (
    cknna,
    cycle_knn,
    find_neighborhoods,
    mutual_knn,
)
from dist_siglip.metrics.representations.svcca import svcca


class RepresentationAlignment(NamedTuple):
    """All measures of one pair of sides; each is 1 for a side compared with itself.

    Attributes:
        mutual_knn: share of common neighbours.
        cycle_knn: share of rows that come back, second side first.
        cka: centred kernel alignment.
        unbiased_cka: the same from the unbiased estimate.
        cknna: unbiased CKA of common neighbours.
        svcca: mean canonical correlation, of standardised coordinates.
    """

    mutual_knn: float
    cycle_knn: float
    cka: float
    unbiased_cka: float
    cknna: float
    svcca: float


@torch.no_grad()
def measure_alignment(
    first_features: Tensor,
    second_features: Tensor,
    *,
    k: int = 10,
    svcca_dimensions: int = 10,
    group: ProcessGroup | None = None,
) -> RepresentationAlignment:
    """Compare two sets of embeddings of the same things by all measures.

    Distributed contract: every rank passes its own rows, any number of them (0 too); the result is
    that of all rows and equal on every rank. Work grows with the square of the number of rows;
    ``estimate_alignment`` looks at random parts.

    Args:
        first_features: (B, D), finite, as they are or from ``center_normalize``.
        second_features: (B, E), finite; row i belongs to row i of the first side.
        k: neighbours of a row, from 2 to one less than the number of rows of all ranks.
        svcca_dimensions: directions of each side for SVCCA.
        group: process group.

    Raises:
        UserError: if there are fewer than 4 rows, k does not fit, or features are unusable; on
            every rank.

    Example:
        >>> rows = torch.eye(6) + 0.1 * torch.arange(36.0).view(6, 6).sin()
        >>> measure_alignment(rows, 2 * rows, k=2).mutual_knn
        1.0
    """
    neighborhoods = find_neighborhoods(first_features, second_features, k, group=group)
    moments = collect_moments(first_features, second_features, group=group)
    return RepresentationAlignment(
        mutual_knn=mutual_knn(neighborhoods),
        cycle_knn=cycle_knn(neighborhoods),
        cka=cka(moments),
        unbiased_cka=unbiased_cka(moments),
        cknna=cknna(neighborhoods),
        svcca=svcca(moments, svcca_dimensions),
    )
