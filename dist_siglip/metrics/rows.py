"""Rows of all ranks: checked on every rank at once, selected and ordered, wherever they lie.

A check that fails on one rank raises on all, so that no rank waits for another. Sample ids name the
pairs of a data set; what is chosen and sorted by them does not depend on the number of ranks or on
how pairs were dealt out.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import World, gather_rows
from dist_siglip.errors import UserError
from dist_siglip.health.start_check import describe_differences
from dist_siglip.metrics.tiles import row_slices

# A unit vector rounded to a dtype, its norm included, is as long as that up to half a step of the
# dtype, 0.4 % in bfloat16; twice as much is allowed. Rows of float32 are often float16 widened.
_UNIT_NORM_TOLERANCE = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


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


def check_features(
    features: Sequence[tuple[str, Tensor]],
    ids: Sequence[tuple[str, Tensor]] | None = None,
    *,
    unit_norm: bool,
    paired: bool = False,
    group: ProcessGroup | None = None,
) -> None:
    """Raise on every rank if any rank holds features the metrics cannot use.

    Distributed contract: two ``gather_rows`` of a few bytes; every rank raises the same error or
    none does. What is no tensor at all raises where it is.

    Args:
        features: (name, tensor) of every feature matrix, each to be (rows, D) with one D, float16,
            bfloat16, float32 or float64.
        ids: (name, tensor) per row of ``features[k]``, same order, each to be int64 (rows,); None
            if rows have none.
        unit_norm: whether rows must be L2-normalised: their norm 1 within 1e-3, for bfloat16
            within 8e-3.
        paired: whether row i of one matrix belongs to row i of the other.
        group: process group.

    Raises:
        UserError: wrong type, shape, dtype or D, a value that is not finite or a row that is not
            normalised; names the tensor, the row and the rank.
    """
    for name, given in [*features, *(ids or ())]:
        require_tensor(name, given)
    device = features[0][1].device
    problem = _find_any_problem(features, ids, unit_norm, paired)
    if problem is not None:
        problem = f"{problem} (rank {World.detect().rank})"
    raise_together(problem, device=device, group=group)
    widths = gather_rows(
        torch.tensor([[rows.shape[1] for _, rows in features]], device=device), group
    )
    if len(set(widths.flatten().tolist())) > 1:
        raise UserError(
            f"embedding sizes of {', '.join(name for name, _ in features)} by rank are "
            f"{widths.tolist()}; all must be equal; pass features of one model"
        )


def require_tensor(name: str, given: object) -> None:
    """Raise ``UserError`` for arrays and lists in place of a tensor."""
    if not isinstance(given, Tensor):
        kind = f"{type(given).__module__}.{type(given).__name__}".removeprefix("builtins.")
        raise UserError(f"{name} ({kind}) must be a torch.Tensor: torch.as_tensor makes one of it")


def check_same_settings(
    settings: Mapping[str, object], *, device: torch.device, group: ProcessGroup | None = None
) -> None:
    """Raise on every rank if ranks pass different settings; names them and the odd ranks.

    Distributed contract: one ``gather_rows`` of the settings as text.
    """
    text = "".join(f"{name}={value}\n" for name, value in settings.items())
    letters = torch.tensor(list(f"{text}\0".encode()), dtype=torch.uint8, device=device)
    *everyone, _ = bytes(gather_rows(letters, group).tolist()).decode().split("\0")
    facts = [dict(line.split("=", 1) for line in one.splitlines()) for one in everyone]
    if differences := describe_differences(facts):
        raise UserError(f"ranks pass different settings: {'; '.join(differences)}; pass the same")


def raise_together(
    problem: str | None, *, device: torch.device, group: ProcessGroup | None = None
) -> None:
    """Raise ``UserError`` on every rank if any rank has a problem; the lowest rank's text wins.

    Distributed contract: one ``gather_rows``; every rank must call it.

    Args:
        problem: one line, or None if this rank has none.
        device: device of the message; a CUDA device for NCCL.
        group: process group.
    """
    message = b"" if problem is None else f"{problem}\n".encode()
    letters = torch.tensor(list(message), dtype=torch.uint8, device=device)
    texts = bytes(gather_rows(letters, group).tolist()).decode()
    if texts:
        raise UserError(texts.splitlines()[0])


def widen_rows(rows: Tensor) -> Tensor:
    """Widen half precision to float32, and give rows that are unit vectors but for rounding norm 1.

    Example:
        >>> rows = torch.nn.functional.normalize(torch.ones(1, 7), dim=1).bfloat16()
        >>> round(rows.double().norm().item(), 4), round(widen_rows(rows).norm().item(), 4)
        (1.0025, 1.0)
    """
    wide = rows.float()
    if wide.dtype == rows.dtype:
        return wide
    norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    is_unit = (norms - 1).abs() <= _UNIT_NORM_TOLERANCE[rows.dtype]
    return torch.where(is_unit, wide / norms, wide)


def _find_any_problem(
    features: Sequence[tuple[str, Tensor]],
    ids: Sequence[tuple[str, Tensor]] | None,
    unit_norm: bool,
    paired: bool,
) -> str | None:
    """First problem of the matrices, of what belongs to their rows, then of their values."""
    for name, rows in features:
        if rows.ndim != 2 or rows.shape[1] == 0 or rows.dtype not in _UNIT_NORM_TOLERANCE:
            return (
                f"{name} must be a float (rows, D) matrix with D of at least 1; got {rows.dtype} "
                f"{tuple(rows.shape)}"
            )
    counts = {name: len(rows) for name, rows in features}
    if paired and len(set(counts.values())) > 1:
        return (
            f"{' and '.join(f'{name} ({count} rows)' for name, count in counts.items())} must have "
            "equally many rows: row i of one belongs to row i of the other"
        )
    for (name, rows), (id_name, row_ids) in zip(features, ids or (), strict=False):
        if row_ids.dtype != torch.int64:
            return f"{id_name} ({row_ids.dtype}) must be int64, one per row of {name}"
        if row_ids.shape != rows.shape[:1]:
            return f"{id_name} {tuple(row_ids.shape)} must be ({len(rows)},), one per row of {name}"
    for name, rows in features:
        for part in row_slices(len(rows)):
            if problem := _find_unusable_row(name, rows[part], part.start, unit_norm):
                return problem
    return None


def _find_unusable_row(name: str, rows: Tensor, first_row: int, unit_norm: bool) -> str | None:
    unusable = ~torch.isfinite(rows).all(dim=1)
    if unusable.any():
        return (
            f"{name} row {first_row + int(unusable.nonzero()[0])} holds a value that is not "
            "finite; the model has diverged: use an earlier checkpoint or a lower learning rate"
        )
    if unit_norm:
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        far = (norms - 1).abs() > _UNIT_NORM_TOLERANCE[rows.dtype]
        if far.any():
            row = int(far.nonzero()[0])
            return (
                f"{name} row {first_row + row} has norm {float(norms[row]):.4g}, must be 1; "
                "L2-normalise the features first"
            )
    return None
