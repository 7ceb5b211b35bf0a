"""Margins and thresholds between pairs that belong together and all others.

With s the cosine of a pair, a configuration is a (d, margin, relative bias) constellation if
s >= relative_bias + margin for every positive and s <= relative_bias - margin for every negative
pair. Zero sigmoid loss is possible exactly then.

Of queries with several answers (``relevance_margins``), a sigmoid loss that reaches zero leaves one
threshold for all; a softmax compares documents within a query only, so its queries may need
different ones. Retrieval needs no more than the latter.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, max_over_ranks, prepare_exchange, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.metrics.geometry.pair_statistics import PairStatistics
from dist_siglip.metrics.retrieval.nearest import nearest_neighbors
from dist_siglip.metrics.rows import check_features, raise_together, require_tensor
from dist_siglip.metrics.tiles import exact_similarity, tile_side, tile_slices


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
    chunk_rows: int | None = None,
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
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
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
    side = tile_side(chunk_rows, query_features.device)
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
        for rows, columns in tile_slices(len(query_features), len(documents), side):
            scores = exact_similarity(query_features[rows], documents[columns])
            answers = relevance[rows, starts[owner] :][:, columns]
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
    chunk_rows: int | None,
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


class Constellation(NamedTuple):
    """Ends of the positive and negative cosines, and the threshold between them.

    Attributes:
        margin: half the gap, (positive_end - negative_end) / 2; negative if the kinds overlap.
        relative_bias: the best threshold, (positive_end + negative_end) / 2.
        positive_end: lower end of the positive cosines.
        negative_end: upper end of the negative cosines.
    """

    margin: float
    relative_bias: float
    positive_end: float
    negative_end: float


def constellation(statistics: PairStatistics) -> Constellation:
    """Margin and relative bias from the extremes of all pairs, exact.

        margin        = (min positive - max negative) / 2
        relative_bias = (min positive + max negative) / 2

    The margin is the **half** gap; published tables sometimes print the full one. NaN if
    there is no negative pair.

    Args:
        statistics: of all pairs.

    Example:
        >>> import torch
        >>> from dist_siglip.metrics.geometry.pair_statistics import collect_pair_statistics
        >>> features, ids = torch.eye(2), torch.tensor([0, 1])
        >>> statistics = collect_pair_statistics(
        ...     features, features, ids, ids, logit_scale=10.0, logit_bias=-10.0
        ... )
        >>> constellation(statistics)[:2], mean_constellation(statistics)[:2]
        ((0.5, 0.5), (0.5, 0.5))

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, equation 2 and Theorem 3.2.
    """
    return _between(statistics.positive.minimum, statistics.negative.maximum)


def quantile_constellation(statistics: PairStatistics, fraction: float = 0.05) -> Constellation:
    """Margin and relative bias when the worst ``fraction`` of each kind is left aside.

        positive_end = quantile of the positive cosines at fraction
        negative_end = quantile of the negative cosines at 1 - fraction

    Quantiles are those of ``numpy.quantile`` (linear between the two nearest): exact while a kind
    has at most 65,536 pairs (256 images and texts have as many), within 1e-4 beyond.

    Args:
        statistics: of all pairs.
        fraction: share of each kind that may lie on the wrong side, in [0, 0.5].

    Raises:
        UserError: if ``fraction`` is outside [0, 0.5].

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Table 5 (5 % and 95 %).
    """
    if not 0 <= fraction <= 0.5:
        raise UserError(f"fraction ({fraction}) must be in [0, 0.5]; the paper uses 0.05")
    return _between(
        statistics.positive.quantile(fraction), statistics.negative.quantile(1 - fraction)
    )


def mean_constellation(statistics: PairStatistics) -> Constellation:
    """Margin and relative bias between the mean positive and the mean negative cosine.

    Unlike the strict margin it is above 0 for every useful model. The bounds of ``capacity`` that
    are averages (``largest_margin``) hold for it too.

    Args:
        statistics: of all pairs.

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Table 6.
    """
    return _between(statistics.positive.mean, statistics.negative.mean)


def joint_constellation(statistics: Sequence[PairStatistics]) -> Constellation:
    """Margin and relative bias that hold for several pairs of modalities at once.

        positive_end = min over pairs of modalities        negative_end = max over them

    More than two modalities that share scale and bias need one threshold for all of them; the
    margin of each two alone may be larger.

    Args:
        statistics: of every two modalities that are compared, at least one.

    Raises:
        UserError: if there are none.

    Example:
        >>> import torch
        >>> from dist_siglip.metrics.geometry.pair_statistics import collect_pair_statistics
        >>> features, ids = torch.eye(2), torch.tensor([0, 1])
        >>> statistics = [
        ...     collect_pair_statistics(x, features, ids, ids, logit_scale=1.0, logit_bias=0.0)
        ...     for x in (features, torch.tensor([[0.8, 0.6], [0.0, 1.0]]))
        ... ]
        >>> round(joint_constellation(statistics).margin, 4)  # from 0.6 to 0.8
        0.1

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Observation 2, Table 1 (which prints twice this).
    """
    if not statistics:
        raise UserError("a joint constellation needs the statistics of at least two modalities")
    return _between(
        min(pair.positive.minimum for pair in statistics),
        max(pair.negative.maximum for pair in statistics),
    )


def _between(positive_end: float, negative_end: float) -> Constellation:
    return Constellation(
        margin=(positive_end - negative_end) / 2,
        relative_bias=(positive_end + negative_end) / 2,
        positive_end=positive_end,
        negative_end=negative_end,
    )
