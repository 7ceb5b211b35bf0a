"""Alignment of two sets of embeddings of the same things: CKA, CKNNA, SVCCA, shared neighbours.

Row i of both sides belongs to the same thing: two models, two modalities, two checkpoints. The
sides may differ in width; no measure compares a coordinate of one with a coordinate of the other.
"""

from dist_siglip.metrics.alignment.measure import (
    AlignmentEstimate,
    RepresentationAlignment,
    estimate_alignment,
    measure_alignment,
)
from dist_siglip.metrics.alignment.moments import (
    PairedMoments,
    center_normalize,
    cka,
    collect_moments,
    mean_direction,
    svcca,
    unbiased_cka,
)
from dist_siglip.metrics.alignment.neighborhoods import (
    Neighborhoods,
    cknna,
    cycle_knn,
    find_neighborhoods,
    mutual_knn,
)

__all__ = [
    "AlignmentEstimate",
    "Neighborhoods",
    "PairedMoments",
    "RepresentationAlignment",
    "center_normalize",
    "cka",
    "cknna",
    "collect_moments",
    "cycle_knn",
    "estimate_alignment",
    "find_neighborhoods",
    "mean_direction",
    "measure_alignment",
    "mutual_knn",
    "svcca",
    "unbiased_cka",
]
