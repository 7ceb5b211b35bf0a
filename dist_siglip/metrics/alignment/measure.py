"""All measures of the alignment of two sets of embeddings, with deviation and chance level.

All measures depend on the number of rows, so numbers are comparable only for equally many. The
custom of the field is ten random parts of 1000 rows. The same parts with the rows of one side
shuffled give the value by chance.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.metrics.alignment.moments import (
    SVCCA_DIMENSIONS,
    center_normalize,
    check_pairs,
    cka,
    collect_moments,
    mean_direction,
    svcca,
    unbiased_cka,
)
from dist_siglip.metrics.alignment.neighborhoods import (
    NEIGHBORS,
    cknna,
    cycle_knn,
    find_neighborhoods,
    mutual_knn,
)

SUBSETS = 10
SUBSET_ROWS = 1000


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
    k: int = NEIGHBORS,
    svcca_dimensions: int = SVCCA_DIMENSIONS,
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


class AlignmentEstimate(NamedTuple):
    """Mean and standard deviation (over parts, n - 1; NaN for one part) of every measure.

    Attributes:
        mean: of the pairs as they are.
        deviation: of the same.
        chance_mean: with the rows of the second side shuffled.
        chance_deviation: of the same.
        num_rows: of a part.
        num_parts: that were measured.
    """

    mean: RepresentationAlignment
    deviation: RepresentationAlignment
    chance_mean: RepresentationAlignment
    chance_deviation: RepresentationAlignment
    num_rows: int
    num_parts: int


@torch.no_grad()
def estimate_alignment(
    first_features: Tensor,
    second_features: Tensor,
    *,
    center: bool = False,
    num_rows: int = SUBSET_ROWS,
    num_parts: int = SUBSETS,
    k: int = NEIGHBORS,
    svcca_dimensions: int = SVCCA_DIMENSIONS,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> AlignmentEstimate:
    """Measure the alignment of random parts of the rows, with and without shuffling.

    Only the chosen rows are copied and made float64; the features may be of any float dtype.

    Distributed contract: every rank passes its own rows, any number of them (0 too); the result is
    equal on every rank, and that of one process with the rows in rank order.

    Args:
        first_features: (B, D), finite.
        second_features: (B, E), finite; row i belongs to row i of the first side.
        center: whether rows are normalised, centred on the mean of all rows and normalised again.
        num_rows: rows of a part; all rows if there are not more.
        num_parts: random parts, each without repetition.
        k: neighbours of a row.
        svcca_dimensions: directions of each side for SVCCA.
        seed: of parts and shuffles.
        group: process group.

    Raises:
        UserError: if ``num_parts`` is below 1, or as ``measure_alignment``.

    Example:
        >>> rows = torch.arange(120.0).view(30, 4).sin()
        >>> estimate = estimate_alignment(rows, rows, num_rows=20, num_parts=2, k=3)
        >>> estimate.mean.mutual_knn, estimate.num_parts
        (1.0, 2)

    Source:
        BangachevKiril/L2PRH, metrics/compute_metrics.py: ten parts of 1000 rows.
    """
    if num_parts < 1:
        raise UserError(f"num_parts ({num_parts}) must be at least 1; try 10")
    own = check_pairs(first_features, second_features, group=group)
    num_rows = min(num_rows, own.num_rows)
    sides = first_features, second_features
    means = [mean_direction(side, group=group) if center else None for side in sides]
    measured: list[RepresentationAlignment] = []
    shuffled: list[RepresentationAlignment] = []
    for part in range(num_parts):
        generator = np.random.default_rng([seed, part])
        chosen = np.sort(generator.choice(own.num_rows, num_rows, replace=False))
        mine = slice(*np.searchsorted(chosen, [own.start, own.stop]))
        rows = torch.from_numpy(chosen[mine] - own.start).to(first_features.device)
        first, second = (
            side[rows].double() if mean is None else center_normalize(side[rows], mean)
            for side, mean in zip(sides, means, strict=True)
        )
        order = torch.from_numpy(generator.permutation(num_rows)[mine]).to(second.device)
        other = gather_rows(second, group)[order]
        for found, partner in ((measured, second), (shuffled, other)):
            found.append(
                measure_alignment(
                    first, partner, k=k, svcca_dimensions=svcca_dimensions, group=group
                )
            )
    return AlignmentEstimate(
        *_mean_and_deviation(measured), *_mean_and_deviation(shuffled), num_rows, num_parts
    )


def _mean_and_deviation(
    parts: list[RepresentationAlignment],
) -> tuple[RepresentationAlignment, RepresentationAlignment]:
    table = torch.tensor(parts, dtype=torch.float64)
    means = table.mean(dim=0)
    squares = (table - means).square().sum(dim=0)
    deviations = (squares / (len(parts) - 1)).sqrt() if len(parts) > 1 else squares * torch.nan
    return (
        RepresentationAlignment(*means.tolist()),
        RepresentationAlignment(*deviations.tolist()),
    )
