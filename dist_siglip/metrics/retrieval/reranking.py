"""Rank of the best relevant item of each query after the best k are re-ranked.

The nearest k items of the gallery are a query's candidates. A re-ranker scores each pair, and the
candidates change places among themselves; everything behind them stays where it was. So re-ranking
never moves a hit that was not among the candidates, and recall@k of k candidates stays the same.

**Ties count against the query**, as in ``retrieval``. A candidate as near as the first item that
is no candidate is none either: which of them came first was chance.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, gather_rows, max_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import DEFAULT_CHUNK_ROWS
from dist_siglip.metrics.retrieval.nearest import nearest_neighbors
from dist_siglip.metrics.retrieval.positives import PositivePairs
from dist_siglip.metrics.retrieval.ranks import TIE_TOLERANCE

# The score of a pair differs by the rounding of float32 between batches.
SCORE_TOLERANCE = 1e-5

# (query rows (P,) of this rank, gallery positions (P,) among those of all ranks) -> scores (P,)
PairScorer = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def reranked_ranks(
    queries: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    ranks: Tensor,
    score_pairs: PairScorer,
    *,
    k: int,
    positives: PositivePairs | None = None,
    queries_per_call: int = 256,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Rank of the best relevant item of each of this rank's queries, after re-ranking.

    With C the candidates, and z* the best score of a relevant one,

        rank = 1 + number of candidates that are not relevant and have z >= z*

    where a relevant item is a candidate; else the rank before.

    Distributed contract: every rank passes its own rows, any number of them (0 too), and gets the
    ranks of its own queries. One exchange of the gallery without gradient and small gathers.
    ``score_pairs`` is called equally often on every rank, so that it may fetch rows of others. The
    result does not depend on how rows are distributed, as far as the scores do not.

    Args:
        queries: (Q, D), this rank's queries.
        gallery: (M, D), this rank's part of the gallery.
        query_ids: (Q,) int64; equal to that of a gallery row if it is relevant, or see
            ``positives``.
        gallery_ids: (M,) int64.
        ranks: (Q,) int64, before re-ranking, see ``retrieval_ranks``.
        score_pairs: scores pairs of a query row of this rank and a gallery position (a row number
            in rank order); larger is better.
        k: candidates of a query, at least 1.
        positives: which ids of queries and gallery belong together; None: those that are equal.
        queries_per_call: queries whose candidates are scored in one call.
        chunk_rows: longest side of a live rectangle of similarities.
        exchange: how the gallery reaches the other ranks.
        group: process group.

    Returns:
        (Q,) int64, from 1 to gallery size + 1.

    Raises:
        UserError: if k is below 1, or as ``nearest_neighbors``; on every rank.

    Example:
        >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> ids, before = torch.tensor([5]), torch.tensor([2])
        >>> likes_later = lambda rows, positions: positions.float()
        >>> gallery_ids = torch.tensor([4, 5, 6])
        >>> reranked_ranks(gallery[:1], gallery, ids, gallery_ids, before, likes_later, k=2)
        tensor([1])
    """
    if k < 1:
        raise UserError(f"k ({k}) candidates of a query must be at least 1; try 10")
    near = nearest_neighbors(
        queries, gallery, k + 1, chunk_rows=chunk_rows, exchange=exchange, group=group
    )
    # -inf where the gallery ends: then all of it are candidates.
    border = near.similarities[:, k:]
    threshold = border + TIE_TOLERANCE * (1 + border.abs().nan_to_num(posinf=0.0))
    is_candidate = near.similarities[:, :k] > threshold
    scores = _scores(near.positions[:, :k], is_candidate, score_pairs, queries_per_call, group)
    all_ids = gather_rows(gallery_ids, group)
    positives = PositivePairs() if positives is None else positives
    candidate_ids = all_ids[near.positions[:, :k].clamp(min=0)]
    is_relevant = positives.contains(query_ids[:, None], candidate_ids) & is_candidate
    best = scores.masked_fill(~is_relevant, -torch.inf).amax(dim=1)
    bar = best - SCORE_TOLERANCE * (1 + best.abs().nan_to_num(posinf=0.0))
    num_ahead = (is_candidate & ~is_relevant & (scores >= bar[:, None])).sum(dim=1)
    return torch.where(is_relevant.any(dim=1), num_ahead + 1, ranks)


def _scores(
    positions: Tensor,
    is_candidate: Tensor,
    score_pairs: PairScorer,
    queries_per_call: int,
    group: ProcessGroup | None,
) -> Tensor:
    """Scores (Q, k) of the candidates, in as many calls as the rank with most queries needs."""
    scores = torch.full_like(positions, -torch.inf, dtype=torch.float64)
    most = int(max_over_ranks(torch.tensor([len(positions)], device=positions.device), group))
    for start in range(0, most, queries_per_call):
        rows, columns = is_candidate[start : start + queries_per_call].nonzero(as_tuple=True)
        rows = rows + start
        found = score_pairs(rows, positions[rows, columns])
        scores[rows, columns] = found.to(scores.dtype)
    return scores
