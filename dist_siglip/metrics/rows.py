"""Selection and order of the pairs of all ranks, whatever rank they lie on.

Sample ids name the pairs of a data set. What is chosen and sorted by them does not depend on
the number of ranks or on how pairs were dealt out.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import World, gather_rows


def first_occurrences(sample_ids: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """Mark this rank's rows whose sample does not occur earlier, on a lower rank or row.

    Samplers that deal out equal numbers of batches repeat samples; counting them twice would
    flatter or hurt the metrics.

    Distributed contract: one ``gather_rows`` of ids; over all ranks every sample is marked once.

    Args:
        sample_ids: (B,) int64.
        group: process group.

    Returns:
        (B,) bool.

    Example:
        >>> first_occurrences(torch.tensor([4, 7, 4]))
        tensor([ True,  True, False])
    """
    rank = World.detect().rank
    placed = gather_rows(torch.stack([sample_ids, torch.full_like(sample_ids, rank)], 1), group)
    return mark_first(placed[:, 0])[placed[:, 1] == rank]


def mark_first(ids: Tensor) -> Tensor:
    """Mark the first occurrence of every id, (B,) bool.

    Example:
        >>> mark_first(torch.tensor([7, 4, 7]))
        tensor([ True,  True, False])
    """
    ordered, order = ids.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    marked = torch.empty_like(is_first)
    marked[order] = is_first
    return marked


def first_of_each(ids: Tensor, sample_ids: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """Mark this rank's rows whose id does not occur under a lower sample id.

    Distributed contract: one ``gather_rows`` of ids; which rows are marked does not depend on how
    they are distributed.

    Args:
        ids: (B,) int64, or (B, K): then all K are compared.
        sample_ids: (B,) int64; rows of one sample are marked together.
        group: process group.

    Returns:
        (B,) bool.

    Example:
        >>> first_of_each(torch.tensor([7, 8, 7, 7]), torch.tensor([5, 2, 3, 3]))
        tensor([False,  True,  True,  True])
    """
    rank = World.detect().rank
    columns = [ids if ids.ndim == 2 else ids[:, None], sample_ids[:, None]]
    columns.append(torch.full_like(columns[1], rank))
    placed = gather_rows(torch.cat(columns, dim=1), group)
    kinds, which = placed[:, :-2].unique(dim=0, return_inverse=True)
    samples = placed[:, -2]
    lowest = samples.new_full((len(kinds),), torch.iinfo(torch.int64).max)
    lowest.scatter_reduce_(0, which, samples, "amin")
    return (samples == lowest[which])[placed[:, -1] == rank]


def gather_in_order(
    columns: Sequence[Tensor],
    sample_ids: Tensor,
    *,
    chosen: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    """Bring rows of all ranks together, sorted by sample id.

    Distributed contract: one ``gather_rows`` per column and one of ids; every rank gets the same.

    Args:
        columns: tensors of (B, ...), row i belongs to sample ``sample_ids[i]``.
        sample_ids: (B,) int64, each once over all ranks.
        chosen: sample ids to bring, the same on every rank; all if None.
        group: process group.

    Returns:
        One tensor per column, (number of chosen samples, ...).

    Example:
        >>> gather_in_order([torch.tensor([30, 10, 20])], torch.tensor([3, 1, 2]))
        (tensor([10, 20, 30]),)
    """
    if chosen is not None:
        mask = torch.isin(sample_ids, chosen.to(sample_ids.device))
        columns, sample_ids = [column[mask] for column in columns], sample_ids[mask]
    order = gather_rows(sample_ids, group).argsort(stable=True)
    return tuple(gather_rows(column, group)[order] for column in columns)


def gather_sample(
    columns: Sequence[Tensor],
    sample_ids: Tensor,
    *,
    max_rows: int,
    seed: int,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    """Bring randomly chosen rows of all ranks together, in a random order, on the CPU.

    Samples are sorted by id and shuffled with ``seed``; the first ``max_rows`` are taken. Which and
    in which order does not depend on how rows are distributed.

    Distributed contract: as ``gather_in_order``, and one more ``gather_rows`` of ids.

    Args:
        columns: tensors of (B, ...), row i belongs to sample ``sample_ids[i]``.
        sample_ids: (B,) int64, each once over all ranks.
        max_rows: most rows to bring.
        seed: of the choice and the order.
        group: process group.

    Returns:
        One tensor per column, (at most ``max_rows``, ...).

    Example:
        >>> (rows,) = gather_sample([torch.arange(9)], torch.arange(9), max_rows=4, seed=0)
        >>> len(rows.unique())
        4
    """
    (all_ids,) = gather_in_order([sample_ids], sample_ids, group=group)
    shuffled = np.random.default_rng(seed).permutation(all_ids.cpu().numpy())[:max_rows]
    *chosen, ids = gather_in_order(
        [*columns, sample_ids], sample_ids, chosen=torch.from_numpy(shuffled), group=group
    )
    # Rows are sorted by id; they are wanted in the shuffled order.
    order = torch.from_numpy(np.searchsorted(ids.cpu().numpy(), shuffled))
    return tuple(column.cpu()[order] for column in chosen)
