"""Exact nearest neighbours among the keys of all ranks, and how unevenly keys are found (hubness).

A key's **position** is its row number when the rows of all ranks stand in rank order, rank 0's
first; with the same rows in the same order it does not depend on the number of ranks. Shards of
keys travel, queries stay; a query keeps its best k while they pass, so memory is
O(B * k + chunk_rows^2) whatever the number of keys.

The k-occurrence of a key is the number of queries that have it among their k nearest keys; on
average it is k * queries / keys. In high dimension its distribution is skewed: hubs crowd out what
queries look for, and antihubs are in no list at all.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, prepare_exchange, sum_over_ranks
from dist_siglip.losses.kernels.pair_terms import share_an_id
from dist_siglip.metrics.rows import check_features, raise_together, require_tensor
from dist_siglip.metrics.tiles import exact_similarity, tile_side, tile_slices

# One product, computed in rectangles of different shape, differs by 1e-16. Rounded to this step
# it is one number, so that equal keys are ties wherever they lie.
_SIMILARITY_STEP = 2.0**-40
_HUB_FRACTION = 0.01


class Neighbors(NamedTuple):
    """The nearest keys of every query, best first.

    Attributes:
        similarities: (B, k) float64, rounded to 2^-40; -inf where fewer than k keys are allowed.
        positions: (B, k) int64 positions among the keys of all ranks; -1 where there is none.
    """

    similarities: Tensor
    positions: Tensor


@torch.no_grad()
def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    chunk_rows: int | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> Neighbors:
    """Find the k keys of all ranks with the largest inner product with each of this rank's queries.

    Exact; of equal similarities the lowest position comes first. A query and a key that share an
    id are no pair: give a row its own number on both sides to leave out the row itself, or the
    image's number to leave out all captions of an image.

    Distributed contract: every rank passes its own queries and keys, any number of them (0 too),
    and gets the neighbours of its own queries. One exchange of the key shards without gradient, and
    a few small gathers.

    Args:
        queries: (B, D), finite.
        keys: (C, D), finite; this rank's part of the keys.
        k: at least 1; may exceed the number of keys.
        query_ids: (B,) int64, or (B, K) of K kinds, see ``pair_ids``; None leaves out nothing.
        key_ids: (C,) or (C, K); given exactly if ``query_ids`` is.
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
        exchange: how the keys reach the other ranks.
        group: process group.

    Raises:
        UserError: if k is below 1, only one side has ids, features are not finite (names row and
            rank) or shapes do not fit; on every rank.

    Example:
        >>> keys = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> nearest_neighbors(keys, keys, 1, query_ids=torch.arange(3), key_ids=torch.arange(3))[1]
        tensor([[1],
                [2],
                [1]])
    """
    problem = None
    if k < 1:
        problem = f"k ({k}) nearest neighbours must be at least 1; try 10"
    elif (query_ids is None) != (key_ids is None):
        problem = "query_ids and key_ids are given together or not at all"
    require_tensor("queries", queries)
    raise_together(problem, device=queries.device, group=group)
    check_features(
        [("queries", queries), ("keys", keys)],
        None
        if query_ids is None or key_ids is None
        else [("query_ids", _first_kind(query_ids)), ("key_ids", _first_kind(key_ids))],
        unit_norm=False,
        group=group,
    )
    side = tile_side(chunk_rows, queries.device)
    shards = [keys] if key_ids is None else [keys, key_ids]
    prepared = prepare_exchange(
        shards, exchange=exchange, group=group, purpose=f"{k} nearest neighbours"
    )
    first_positions = [0, *accumulate(prepared.row_counts)]
    best = Neighbors(
        queries.new_full((len(queries), k), -torch.inf, dtype=torch.float64),
        queries.new_full((len(queries), k), -1, dtype=torch.int64),
    )

    def visit(owner: int, shard: tuple[Tensor, ...], _contributions: tuple[Tensor, ...]) -> None:
        features = shard[0]
        tiles = list(tile_slices(len(queries), len(features), side))
        if not tiles:
            return

        def scores_of(rows: slice, columns: slice) -> Tensor:
            scores = exact_similarity(queries[rows], features[columns])
            scores.div_(_SIMILARITY_STEP).round_().mul_(_SIMILARITY_STEP)
            if query_ids is not None:
                same = share_an_id(query_ids[rows], shard[1][columns])
                scores.masked_fill_(same, -torch.inf)
            return scores

        def keep(found: Neighbors, rows: slice, columns: slice) -> None:
            positions = found.positions + (first_positions[owner] + columns.start)
            mine = Neighbors(best.similarities[rows], best.positions[rows])
            merged = _merge(mine, Neighbors(found.similarities, positions), k)
            best.similarities[rows], best.positions[rows] = merged

        ties = []
        for rows, columns in tiles:
            found, has_tie = _best_of_tile(scores_of(rows, columns), k)
            keep(found, rows, columns)
            ties.append(has_tie)
        for (rows, columns), has_tie in zip(tiles, torch.stack(ties).tolist(), strict=True):
            if has_tie:
                keep(_best_in_order(scores_of(rows, columns), k), rows, columns)

    prepared.run(visit)
    best.positions[best.similarities == -torch.inf] = -1
    return best


def _first_kind(ids: Tensor) -> Tensor:
    return ids[:, 0] if ids.ndim == 2 else ids


def _best_of_tile(scores: Tensor, k: int) -> tuple[Neighbors, Tensor]:
    """Best columns of each row, and whether a row has more columns equal to its last than fit.

    Of such a row nothing is kept: topk may take any of several equal columns.
    """
    k = min(k, scores.shape[1])
    values, columns = scores.topk(k, dim=1)
    last = values[:, -1:]
    tied = (scores == last).sum(dim=1) > (values == last).sum(dim=1)
    # All of them -inf: no key is allowed, whichever it would be.
    tied &= last[:, 0] > -torch.inf
    return Neighbors(values.masked_fill_(tied[:, None], -torch.inf), columns), tied.any()


def _best_in_order(scores: Tensor, k: int) -> Neighbors:
    """Best columns of each row that ``_best_of_tile`` left out; of equal ones the lowest."""
    ordered = scores.sort(dim=1, descending=True, stable=True)
    k = min(k, scores.shape[1])
    values, columns = ordered.values[:, :k], ordered.indices[:, :k]
    last = values[:, -1:]
    tied = (scores == last).sum(dim=1) > (values == last).sum(dim=1)
    return Neighbors(values.masked_fill(~tied[:, None], -torch.inf), columns)


def _merge(first: Neighbors, second: Neighbors, k: int) -> Neighbors:
    """Best k of two lists per row: by falling exact_similarity, then by rising position."""
    similarities = torch.cat([first.similarities, second.similarities], dim=1)
    positions, order = torch.cat([first.positions, second.positions], dim=1).sort(dim=1)
    similarities, by_similarity = similarities.gather(1, order).sort(
        dim=1, descending=True, stable=True
    )
    return Neighbors(similarities[:, :k], positions.gather(1, by_similarity)[:, :k])


class Hubness(NamedTuple):
    """Hubness of the keys.

    Attributes:
        skewness: third standardised moment of the k-occurrences, over the keys; 0 if every key is
            found equally often.
        top_share: share of all places in the lists that is taken by the most found 1 % of the
            keys (at least one key); 0.01 if every key is found equally often.
        antihubs: share of keys in no list, in [0, 1).
    """

    skewness: float
    top_share: float
    antihubs: float


@torch.no_grad()
def hubness(
    queries: Tensor,
    keys: Tensor,
    k: int = 10,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    chunk_rows: int | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> Hubness:
    """Measure how unevenly the keys of all ranks are found by the queries of all ranks.

    Distributed contract: as ``nearest_neighbors``, and one all-reduce of a count for each key.
    Every rank gets the same result.

    Args:
        queries: (B, D), finite.
        keys: (C, D), finite.
        k: length of the lists; cut to the number of keys that are allowed.
        query_ids: (B,) int64, or None to leave out nothing.
        key_ids: (C,) int64; keys with the query's id are not in its list.
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
        exchange: how the keys reach the other ranks.
        group: process group.

    Returns:
        Measures over the keys of all ranks; zeros without keys or queries.

    Raises:
        UserError: as ``nearest_neighbors``.

    Example:
        >>> keys = torch.eye(4)
        >>> hubness(keys, keys, 1)
        Hubness(skewness=0.0, top_share=0.25, antihubs=0.0)
        >>> hubness(keys[[0, 0, 0, 1]], keys, 1).antihubs
        0.5

    Source:
        Radovanovic et al. 2010, JMLR 11:2487, equation 1 (skewness of the k-occurrences).
    """
    found = nearest_neighbors(
        queries,
        keys,
        k,
        query_ids=query_ids,
        key_ids=key_ids,
        chunk_rows=chunk_rows,
        exchange=exchange,
        group=group,
    )
    num_keys = int(sum_over_ranks(torch.tensor(len(keys), device=keys.device), group))
    positions = found.positions[found.positions >= 0]
    counts = sum_over_ranks(torch.bincount(positions, minlength=num_keys), group)
    return hubness_of_counts(counts)


def hubness_of_counts(counts: Tensor) -> Hubness:
    """Hubness of known k-occurrences.

    Args:
        counts: (keys,) how many lists hold each key.

    Example:
        >>> [round(number, 4) for number in hubness_of_counts(torch.tensor([3, 1, 0, 0]))]
        [0.8165, 0.75, 0.5]
    """
    counts = counts.double().cpu()
    total = float(counts.sum())
    if total == 0:
        return Hubness(0.0, 0.0, 0.0)
    deviations = counts - counts.mean()
    spread = float(deviations.square().mean())
    num_hubs = max(1, round(_HUB_FRACTION * len(counts)))
    return Hubness(
        skewness=float(deviations.pow(3).mean()) / spread**1.5 if spread else 0.0,
        top_share=float(counts.topk(num_hubs).values.sum()) / total,
        antihubs=float((counts == 0).double().mean()),
    )
