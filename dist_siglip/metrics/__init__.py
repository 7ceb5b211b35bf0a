"""Metrics of an embedding space over all ranks: retrieval, gap, margin, logits.

Every metric is a function of this rank's rows that also runs in one process without any process
group; ``PairEvaluation`` is the one class, for validation epochs.
"""

from dist_siglip.metrics.evaluation import Evaluation, PairEvaluation, evaluate_pairs
from dist_siglip.metrics.geometry.constellation import (
    Constellation,
    constellation,
    joint_constellation,
    mean_constellation,
    quantile_constellation,
)
from dist_siglip.metrics.geometry.gap import ModalityGap, modality_gap
from dist_siglip.metrics.geometry.logits import (
    RetrievalGuarantee,
    expected_sigmoid_loss,
    logit_summary,
    retrieval_guarantee,
)
from dist_siglip.metrics.geometry.pair_statistics import (
    CosineSummary,
    PairStatistics,
    RowMargins,
    collect_pair_statistics,
    histogram_edges,
)
from dist_siglip.metrics.geometry.relevance import RelevanceMargins, relevance_margins
from dist_siglip.metrics.geometry.separability import (
    SeparatingDirection,
    linear_separability,
    separating_direction,
)
from dist_siglip.metrics.geometry.spectrum import (
    Moments,
    collect_moments,
    components_for,
    effective_rank,
    explained_variance_ratios,
)
from dist_siglip.metrics.geometry.uniformity import cross_uniformity, uniformity
from dist_siglip.metrics.retrieval.hubness import Hubness, hubness
from dist_siglip.metrics.retrieval.nearest import Neighbors, nearest_neighbors
from dist_siglip.metrics.retrieval.ranks import (
    median_rank,
    recall_at_k,
    retrieval_ranks,
    retrieval_ranks_both_ways,
)
from dist_siglip.metrics.retrieval.reranking import reranked_ranks
from dist_siglip.metrics.theory.capacity import (
    Exponents,
    LargestPairs,
    RequiredDimension,
    capacity_alpha,
    capacity_exponents,
    critical_documents,
    find_capacity_problem,
    largest_margin,
    largest_pairs,
    margin_of_dimension,
    required_dimension,
    subset_dimension,
    subset_dimension_scale,
    subset_inner_products,
    subset_margin,
)
from dist_siglip.metrics.theory.constructions import (
    code_alpha,
    constellation_from_code,
    construction_one,
    construction_two,
    random_code,
    simplex_code,
    subset_code,
)

__all__ = [
    "Constellation",
    "CosineSummary",
    "Evaluation",
    "Exponents",
    "Hubness",
    "LargestPairs",
    "ModalityGap",
    "Moments",
    "Neighbors",
    "PairEvaluation",
    "PairStatistics",
    "RelevanceMargins",
    "RequiredDimension",
    "RetrievalGuarantee",
    "RowMargins",
    "SeparatingDirection",
    "capacity_alpha",
    "capacity_exponents",
    "code_alpha",
    "collect_moments",
    "collect_pair_statistics",
    "components_for",
    "constellation",
    "constellation_from_code",
    "construction_one",
    "construction_two",
    "critical_documents",
    "cross_uniformity",
    "effective_rank",
    "evaluate_pairs",
    "expected_sigmoid_loss",
    "explained_variance_ratios",
    "find_capacity_problem",
    "histogram_edges",
    "hubness",
    "joint_constellation",
    "largest_margin",
    "largest_pairs",
    "linear_separability",
    "logit_summary",
    "margin_of_dimension",
    "mean_constellation",
    "median_rank",
    "modality_gap",
    "nearest_neighbors",
    "quantile_constellation",
    "random_code",
    "recall_at_k",
    "relevance_margins",
    "required_dimension",
    "reranked_ranks",
    "retrieval_guarantee",
    "retrieval_ranks",
    "retrieval_ranks_both_ways",
    "separating_direction",
    "simplex_code",
    "subset_code",
    "subset_dimension",
    "subset_dimension_scale",
    "subset_inner_products",
    "subset_margin",
    "uniformity",
]
