"""Refuse unusable features on every rank at once, so that no rank waits for one that raised."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import World, gather_rows
from dist_siglip.errors import UserError
from dist_siglip.metrics.tiles import row_slices

# bfloat16 rounds the norm of a unit vector by up to 0.4 %.
_UNIT_NORM_TOLERANCE = 0.02


def check_features(
    features: Sequence[tuple[str, Tensor]],
    ids: Sequence[tuple[str, Tensor]],
    *,
    unit_norm: bool,
    group: ProcessGroup | None = None,
) -> None:
    """Raise on every rank if any rank holds features the metrics cannot use.

    Distributed contract: two ``gather_rows`` of a few bytes; every rank raises the same error or
    none does.

    Args:
        features: (name, tensor) of every feature matrix, each to be (rows, D) with one D.
        ids: (name, tensor) per row of ``features[k]``, same order, each to be int64 (rows,).
        unit_norm: whether rows must be L2-normalised.
        group: process group.

    Raises:
        UserError: wrong shape, dtype or D, a value that is not finite or a row that is not
            normalised; names the tensor, the row and the rank.
    """
    device = features[0][1].device
    rank = World.detect().rank
    problem = next(
        (
            text
            for (name, rows), (id_name, row_ids) in zip(features, ids, strict=True)
            for text in (_find_problem(name, rows, id_name, row_ids, unit_norm),)
            if text is not None
        ),
        None,
    )
    if problem is not None:
        problem = f"{problem} (rank {rank})"
    raise_together(problem, device=device, group=group)
    widths = gather_rows(
        torch.tensor([[rows.shape[1] for _, rows in features]], device=device), group
    )
    if len(set(widths.flatten().tolist())) > 1:
        raise UserError(
            f"embedding sizes of {', '.join(name for name, _ in features)} by rank are "
            f"{widths.tolist()}; all must be equal; pass features of one model"
        )


def raise_together(
    problem: str | None, *, device: torch.device, group: ProcessGroup | None = None
) -> None:
    """Raise ``UserError`` on every rank if any rank has a problem; the lowest rank's text wins.

    Distributed contract: one ``gather_rows``; every rank must call it.

    Args:
        problem: one line, or None if this rank is well.
        device: device of the message; a CUDA device for NCCL.
        group: process group.

    Example:
        >>> raise_together(None, device=torch.device("cpu"))
    """
    message = b"" if problem is None else f"{problem}\n".encode()
    letters = torch.tensor(list(message), dtype=torch.uint8, device=device)
    texts = bytes(gather_rows(letters, group).tolist()).decode()
    if texts:
        raise UserError(texts.splitlines()[0])


def _find_problem(
    name: str, rows: Tensor, id_name: str, row_ids: Tensor, unit_norm: bool
) -> str | None:
    if rows.ndim != 2 or not rows.is_floating_point():
        return f"{name} must be a float (rows, D) matrix; got {rows.dtype} {tuple(rows.shape)}"
    if row_ids.shape != rows.shape[:1] or row_ids.dtype != torch.int64:
        return (
            f"{id_name} must be int64 ({rows.shape[0]},), one per row of {name}; "
            f"got {row_ids.dtype} {tuple(row_ids.shape)}"
        )
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
        far = (norms - 1).abs() > _UNIT_NORM_TOLERANCE
        if far.any():
            row = int(far.nonzero()[0])
            return (
                f"{name} row {first_row + row} has norm {float(norms[row]):.4g}, must be 1; "
                "L2-normalise the features first"
            )
    return None
