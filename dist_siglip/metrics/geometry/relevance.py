"""Margins between answers and other documents, by one threshold for all queries or one for each.

A sigmoid loss that reaches zero leaves one threshold for all; a softmax compares documents within
a query only, so its queries may need different ones. Retrieval needs no more than the latter.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, max_over_ranks, prepare_exchange, sum_over_ranks
from dist_siglip.losses.arguments import DEFAULT_CHUNK_ROWS
from dist_siglip.metrics.checks import check_features, raise_together, require_tensor
from dist_siglip.metrics.retrieval.nearest import nearest_neighbors
from dist_siglip.metrics.tiles import similarity, tile_slices


class RelevanceMargins(NamedTuple):
    """Half gaps between the answers of queries and other documents; negative where they overlap.

    Attributes:
        margin: (worst answer of any query - best other document of any query) / 2.
        relative_bias: the threshold in the middle of that gap.
        row_margin: smallest over queries of (their worst answer - their best other document) / 2.
        top_k_accuracy: share of all answers that are among the k best documents of their query,
            where k is the number of its answers; 1 exactly if ``row_margin`` is above 0.
    """

    margin: float
    relative_bias: float
    row_margin: float
    top_k_accuracy: float


@torch.no_grad()
def relevance_margins(
    query_features: Tensor,
    document_features: Tensor,
    relevance: Tensor,
    *,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> RelevanceMargins:
    """Measure the margins of this and all ranks' queries against the documents of all ranks.

        margin     = (min_{q, relevant p} s[q, p] - max_{q, other n} s[q, n]) / 2
        row_margin = min_q (min_{relevant p} s[q, p] - max_{other n} s[q, n]) / 2

    with s the inner product. Queries without answers count for the best other document only.

    Distributed contract: every rank passes its own queries and documents (0 of either too); two
    exchanges of the documents without gradient and a few small gathers. Every rank gets the same.

    Args:
        query_features: (B, D), L2-normalised.
        document_features: (C, D), L2-normalised.
        relevance: (B, N), bool; columns are the documents of all ranks in rank order.
        chunk_rows: longest side of a live rectangle of similarities.
        exchange: how documents reach the other ranks.
        group: process group.

    Returns:
        ``RelevanceMargins``; infinite margins where every document is an answer, NaN accuracy
        where none is.

    Raises:
        UserError: if features are unusable (names row and rank) or ``relevance`` does not fit; on
            every rank.

    Example:
        >>> documents = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> relevance = torch.tensor([[True, False, False], [False, False, True]])
        >>> found = relevance_margins(torch.eye(2), documents, relevance)
        >>> [round(value, 6) for value in found]
        [0.1, 0.9, 0.1, 1.0]

    Source:
        Bangachev et al. 2026, arXiv:2605.23556, code BangachevKiril/TopK (margin, up to the
        threshold, which is 0 there); Weller et al. 2025, arXiv:2508.21038, code
        google-deepmind/limit (top-k accuracy).
    """
    check_features(
        [("query_features", query_features), ("document_features", document_features)],
        unit_norm=True,
        group=group,
    )
    require_tensor("relevance", relevance)
    prepared = prepare_exchange(
        [document_features], exchange=exchange, group=group, purpose="relevance margins"
    )
    shape = (len(query_features), prepared.total_rows)
    problem = None
    if relevance.shape != shape or relevance.dtype != torch.bool:
        problem = (
            f"relevance {tuple(relevance.shape)} ({relevance.dtype}) must be bool {shape}: a row "
            "for each query of this rank, a column for each document of all ranks"
        )
    raise_together(problem, device=query_features.device, group=group)
    starts = [0, *accumulate(prepared.row_counts)]
    worst_answer = query_features.new_full(shape[:1], torch.inf, dtype=torch.float64)
    best_other = -worst_answer

    def visit(owner: int, shard: tuple[Tensor, ...], _contributions: tuple[Tensor, ...]) -> None:
        (documents,) = shard
        for rows, columns in tile_slices(len(query_features), len(documents), chunk_rows):
            scores = similarity(query_features[rows], documents[columns])
            answers = relevance[rows, starts[owner] : starts[owner + 1]][:, columns]
            worst_here = scores.masked_fill(~answers, torch.inf).amin(dim=1)
            best_here = scores.masked_fill(answers, -torch.inf).amax(dim=1)
            worst_answer[rows] = torch.minimum(worst_answer[rows], worst_here)
            best_other[rows] = torch.maximum(best_other[rows], best_here)

    prepared.run(visit)
    row_margins = (worst_answer - best_other) / 2
    nothing = worst_answer.new_full((1,), -torch.inf)
    extremes = torch.stack(
        [torch.cat([nothing, side]).max() for side in (-worst_answer, best_other, -row_margins)]
    )
    low, highest, row = max_over_ranks(extremes, group).tolist()
    return RelevanceMargins(
        margin=(-low - highest) / 2,
        relative_bias=(-low + highest) / 2,
        row_margin=-row,
        top_k_accuracy=_accuracy(
            query_features, document_features, relevance, chunk_rows, exchange, group
        ),
    )


def _accuracy(
    queries: Tensor,
    documents: Tensor,
    relevance: Tensor,
    chunk_rows: int,
    exchange: ExchangeName,
    group: ProcessGroup | None,
) -> float:
    """Share of answers among the k best of their query, k the number of its answers."""
    counts = relevance.sum(dim=1)
    most = int(max_over_ranks(torch.cat([counts.new_ones(1), counts]).max(), group))
    nearest = nearest_neighbors(
        queries, documents, most, chunk_rows=chunk_rows, exchange=exchange, group=group
    )
    in_top = torch.arange(most, device=counts.device) < counts[:, None]
    found = in_top & (nearest.positions >= 0)
    hits = relevance.gather(1, nearest.positions.clamp_min(0)) & found
    total = sum_over_ranks(torch.stack([hits.sum(), counts.sum()]), group)
    return float(total[0] / total[1])
