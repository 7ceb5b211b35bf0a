"""Do two sets of embeddings of the same things have the same structure?

Row i of both sides belongs to the same thing: two models, two modalities, two checkpoints. The
sides may differ in width; no measure compares a coordinate of one with a coordinate of the other.
"""

from dist_siglip.metrics.representations.centering import center_normalize, mean_direction
from dist_siglip.metrics.representations.kernel_alignment import cka, unbiased_cka
from dist_siglip.metrics.representations.measure import RepresentationAlignment, measure_alignment
from dist_siglip.metrics.representations.moments import PairedMoments, collect_moments
from dist_siglip.metrics.representations.neighborhoods import (
    Neighborhoods,
    cknna,
    cycle_knn,
    find_neighborhoods,
    mutual_knn,
)
from dist_siglip.metrics.representations.subsamples import AlignmentEstimate, estimate_alignment
from dist_siglip.metrics.representations.svcca import svcca

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
