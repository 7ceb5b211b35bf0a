"""What an embedding space is worth: retrieval, gap, margin and logits over all ranks.

Every metric is a function of this rank's rows that also runs in one process without any process
group; ``PairEvaluation`` is the one class, for validation epochs.
"""

from dist_siglip.metrics.constellation import (
    Constellation,
    constellation,
    quantile_constellation,
)
from dist_siglip.metrics.evaluation import Evaluation, PairEvaluation, evaluate_pairs
from dist_siglip.metrics.gap import ModalityGap, modality_gap
from dist_siglip.metrics.logits import expected_sigmoid_loss, logit_summary
from dist_siglip.metrics.nearest import Neighbors, nearest_neighbors
from dist_siglip.metrics.pair_statistics import (
    CosineSummary,
    PairStatistics,
    collect_pair_statistics,
    histogram_edges,
)
from dist_siglip.metrics.relevance import RelevanceMargins, relevance_margins
from dist_siglip.metrics.retrieval import (
    median_rank,
    recall_at_k,
    retrieval_ranks,
    retrieval_ranks_both_ways,
)
from dist_siglip.metrics.separability import linear_separability
from dist_siglip.metrics.uniformity import uniformity

__all__ = [
    "Constellation",
    "CosineSummary",
    "Evaluation",
    "ModalityGap",
    "Neighbors",
    "PairEvaluation",
    "PairStatistics",
    "RelevanceMargins",
    "collect_pair_statistics",
    "constellation",
    "evaluate_pairs",
    "expected_sigmoid_loss",
    "histogram_edges",
    "linear_separability",
    "logit_summary",
    "median_rank",
    "modality_gap",
    "nearest_neighbors",
    "quantile_constellation",
    "recall_at_k",
    "relevance_margins",
    "retrieval_ranks",
    "retrieval_ranks_both_ways",
    "uniformity",
]
