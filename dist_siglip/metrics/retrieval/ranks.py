"""Rank of the best relevant item of each query among the items of all ranks, also after re-ranking.

An item is relevant to a query if their ids are equal, or as ``positives`` says; a query may have
any number of relevant items (five captions of an image, or the same caption under several
images). With s the similarity and s* that of the best relevant item,

    rank = 1 + number of items that are not relevant and have s >= s*

**Ties count against the query**: equal embeddings give the last rank, never recall 1. Relevant
items never count against each other. "Equal" allows for rounding: s >= s* - 1e-9 * (1 + |s*|),
with similarities in float64. A query without any relevant item has rank gallery size + 1.

Both directions come from one exchange of the text shards with their ids and the similarities of
their best relevant images; it returns the counts of each shard to its rank. Where relevant pairs
lie on different ranks, an exchange before that finds the best ones.

A re-ranker scores the pairs of a query and its candidates, the nearest k items. They change places
among themselves; everything behind them stays where it was, so recall@k of k candidates stays the
same. A candidate as near as the first item that is no candidate is none either: which of them came
first was chance.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import (
    AccumulatorSpec,
    ExchangeName,
    World,
    circulate,
    gather_rows,
    max_over_ranks,
)
from dist_siglip.errors import UserError
from dist_siglip.metrics.retrieval.narrow_counts import Bounds, count_narrowly
from dist_siglip.metrics.retrieval.nearest import nearest_neighbors
from dist_siglip.metrics.retrieval.positives import PositivePairs
from dist_siglip.metrics.rows import check_features
from dist_siglip.metrics.tiles import (
    exact_similarity,
    narrow_error,
    squared_norms,
    tile_side,
    tile_slices,
)

TIE_TOLERANCE = 1e-9
# The score of a pair differs by the rounding of float32 between batches.
SCORE_TOLERANCE = 1e-5


def retrieval_ranks(
    queries: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    *,
    chunk_rows: int | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Rank of the best relevant gallery item for each of this rank's queries.

    One direction of ``retrieval_ranks_both_ways``, which see for definition and contract.

    Args:
        queries: (Q, D), this rank's queries.
        gallery: (M, D), this rank's part of the gallery.
        query_ids: (Q,) int64.
        gallery_ids: (M,) int64.
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
        exchange: how the gallery reaches the other ranks.
        group: process group.

    Returns:
        (Q,) int64, from 1 to gallery size + 1.

    Example:
        >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> retrieval_ranks(gallery[:1], gallery, torch.tensor([5]), torch.tensor([4, 5, 5]))
        tensor([2])
    """
    return retrieval_ranks_both_ways(
        queries,
        gallery,
        query_ids,
        gallery_ids,
        chunk_rows=chunk_rows,
        exchange=exchange,
        group=group,
    )[0]


@torch.no_grad()
def retrieval_ranks_both_ways(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    positives: PositivePairs | None = None,
    chunk_rows: int | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Ranks of this rank's images among all texts, and of its texts among all images.

    The definition and the tie rule are in the module docstring. Image ``i`` and text ``j`` belong
    together if ``image_ids[i] == text_ids[j]``, or as ``positives`` says; the two sides may differ
    in number.

    Distributed contract: every rank passes its own rows, any number of them (0 too), and gets
    the ranks of its own rows on the gallery of all ranks. One or two exchanges of the text shards
    without gradient, and a few small gathers. Live memory: one (chunk_rows, chunk_rows) float32
    rectangle, its bools and the shards of the exchange. The result does not depend on how rows
    are distributed.

    Args:
        image_features: (B, D), any float dtype; L2-normalised, or of order one.
        text_features: (C, D).
        image_ids: (B,) int64.
        text_ids: (C,) int64.
        positives: which ids belong together; None: those that are equal.
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
        exchange: how the texts reach the other ranks.
        group: process group.

    Returns:
        (image_to_text_ranks (B,), text_to_image_ranks (C,)), int64, from 1 to gallery size + 1.

    Raises:
        UserError: if features are not finite (names row and rank) or shapes do not fit; on
            every rank.

    Example:
        >>> images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> image_ids, text_ids = torch.tensor([0, 1]), torch.tensor([0, 0, 1])
        >>> retrieval_ranks_both_ways(images, texts, image_ids, text_ids)
        (tensor([1, 1]), tensor([1, 2, 1]))
    """
    check_features(
        [("image_features", image_features), ("text_features", text_features)],
        [("image_ids", image_ids), ("text_ids", text_ids)],
        unit_norm=False,
        group=group,
    )
    positives = PositivePairs() if positives is None else positives
    side = tile_side(chunk_rows, image_features.device)
    image_best, text_best = _best_relevant(
        image_features,
        text_features,
        image_ids,
        text_ids,
        positives,
        side=side,
        exchange=exchange,
        group=group,
    )
    image_threshold = image_best - TIE_TOLERANCE * (1 + image_best.abs())
    text_threshold = text_best - TIE_TOLERANCE * (1 + text_best.abs())
    image_count = torch.zeros_like(image_ids)
    image_squares = squared_norms(image_features)

    def visit(_owner: int, shard: tuple[Tensor, ...], contributions: tuple[Tensor, ...]) -> None:
        features, ids, threshold = shard
        (text_count,) = contributions
        text_count.zero_()
        if not len(ids) or not len(image_ids):
            return
        tiles = list(tile_slices(len(image_ids), len(ids), side))
        found = positives.between(image_ids, ids, side)
        longest = (image_squares.max() * squared_norms(features).max()).sqrt()
        error = narrow_error(features.shape[1])
        own, other = (Bounds.of(each, error, longest) for each in (image_threshold, threshold))
        too_many = []
        for rows, columns in tiles:
            counts = count_narrowly(
                image_features[rows],
                features[columns],
                own.part(rows),
                other.part(columns),
                found.mask(rows, columns),
            )
            image_count[rows] += counts.of_rows
            text_count[columns] += counts.of_columns
            too_many.append(counts.has_too_many)
        for (rows, columns), is_open in zip(tiles, torch.stack(too_many).tolist(), strict=True):
            if is_open:  # as where many features are equal
                scores = exact_similarity(image_features[rows], features[columns])
                if (positive := found.mask(rows, columns)) is not None:
                    scores.masked_fill_(positive, -torch.inf)
                image_count[rows] += (scores >= image_threshold[rows, None]).sum(dim=1)
                text_count[columns] += (scores >= threshold[None, columns]).sum(dim=0)

    (text_count,) = circulate(
        [text_features, text_ids, text_threshold],
        visit,
        accumulators=[AccumulatorSpec((), torch.int64)],
        exchange=exchange,
        group=group,
    )
    return image_count + 1, text_count + 1


def recall_at_k(ranks: Tensor, k: int, *, gallery_size: int | None = None) -> float:
    """Fraction of queries with at least one relevant item among the first k.

        recall@k = mean over queries of [rank <= k]

    This is CLIP_benchmark's convention; hits / number of relevant items is another number.

    Args:
        ranks: (Q,) ranks, from 1; of all queries, not of one rank's.
        k: at least 1.
        gallery_size: number of items ranked. Needed only if ``k`` may exceed it: a query without
            any relevant item, which has rank gallery size + 1, then stays a miss.

    Returns:
        Mean over queries, in [0, 1].

    Raises:
        UserError: if there are no queries or k < 1.

    Example:
        >>> recall_at_k(torch.tensor([1, 3, 6]), 5)
        0.6666666666666666
        >>> recall_at_k(torch.tensor([1, 4]), 10, gallery_size=3)
        0.5

    Source:
        LAION-AI/CLIP_benchmark, zero-shot retrieval: "at least one positive in the top k".
    """
    if k < 1:
        raise UserError(f"k ({k}) of recall@k must be at least 1")
    _require_queries(ranks)
    top = k if gallery_size is None else min(k, gallery_size)
    return float((ranks <= top).double().mean())


def median_rank(ranks: Tensor) -> float:
    """Median over queries of the rank of the best relevant item; 1 is best.

    Args:
        ranks: (Q,) ranks, from 1; of all queries.

    Returns:
        The middle rank, or the mean of the two middle ones.

    Raises:
        UserError: if there are no queries.

    Example:
        >>> median_rank(torch.tensor([9, 1, 2, 4]))
        3.0
    """
    _require_queries(ranks)
    ordered = ranks.sort().values.double()
    last = len(ordered) - 1
    return float((ordered[last // 2] + ordered[(last + 1) // 2]) / 2)


def _require_queries(ranks: Tensor) -> None:
    if ranks.ndim != 1 or len(ranks) == 0:
        raise UserError(f"ranks must be (Q,) with at least one query; got {tuple(ranks.shape)}")


def _best_relevant(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    positives: PositivePairs,
    *,
    side: int,
    exchange: ExchangeName,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Similarity of the best relevant item for own images and own texts; -inf without any."""
    image_best = image_features.new_full(image_ids.shape, -torch.inf, dtype=torch.float64)

    def visit(_owner: int, shard: tuple[Tensor, ...], contributions: tuple[Tensor, ...]) -> None:
        features, ids = shard
        (text_best,) = contributions
        text_best.fill_(-torch.inf)
        found = positives.between(image_ids, ids, side)
        for rows, columns in tile_slices(len(image_ids), len(ids), side):
            positive = found.mask(rows, columns)
            if positive is None:
                continue
            scores = exact_similarity(image_features[rows], features[columns])
            scores.masked_fill_(~positive, -torch.inf)
            image_best[rows] = torch.maximum(image_best[rows], scores.amax(dim=1))
            text_best[columns] = torch.maximum(text_best[columns], scores.amax(dim=0))

    if positives.pairs is None and _relevant_pairs_are_local(image_ids, text_ids, group):
        text_best = image_best.new_empty(text_ids.shape)
        visit(0, (text_features, text_ids), (text_best,))
        return image_best, text_best
    (text_best,) = circulate(
        [text_features, text_ids],
        visit,
        accumulators=[AccumulatorSpec((), torch.float64)],
        combine="max",
        exchange=exchange,
        group=group,
    )
    return image_best, text_best


def _relevant_pairs_are_local(
    image_ids: Tensor, text_ids: Tensor, group: ProcessGroup | None
) -> bool:
    """Whether every id lives on one rank only; the same answer on every rank."""
    own_ids = torch.cat([image_ids, text_ids])
    rank = torch.full_like(own_ids, World.detect().rank)
    placed = gather_rows(torch.stack([own_ids, rank], dim=1).unique(dim=0), group)
    return len(placed) == len(placed[:, 0].unique())


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
    chunk_rows: int | None = None,
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
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
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
