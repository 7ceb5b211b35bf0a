"""Hubness: how unevenly items are found as nearest neighbours.

The k-occurrence of a key is the number of queries that have it among their k nearest keys; on
average it is k * queries / keys. In high dimension its distribution is skewed: hubs crowd out what
queries look for, and antihubs are in no list at all.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, sum_over_ranks
from dist_siglip.losses.arguments import DEFAULT_CHUNK_ROWS
from dist_siglip.metrics.retrieval.nearest import nearest_neighbors

_HUB_FRACTION = 0.01


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
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
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
        chunk_rows: longest side of a live rectangle of similarities.
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
