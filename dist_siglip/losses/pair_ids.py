"""Identity of pictures and captions: which rows of a batch or a gallery stand for the same thing.

A row may have two ids, of its caption and of its picture. Two rows are duplicates if they share
either: the same caption under two pictures, or two captions of one picture.
"""

import torch
from torch import Tensor


def join_ids(caption_ids: Tensor | None, picture_ids: Tensor | None) -> Tensor | None:
    """Put the ids of rows side by side, so that they travel as one.

    Args:
        caption_ids: (B,), integers; None for none.
        picture_ids: (B,), likewise.

    Returns:
        (B, 2) of captions and pictures; (B,) if one is None; None if both are.

    Example:
        >>> join_ids(torch.tensor([4, 5]), torch.tensor([7, 7]))
        tensor([[4, 7],
                [5, 7]])
    """
    if caption_ids is None or picture_ids is None:
        return picture_ids if caption_ids is None else caption_ids
    return torch.stack([caption_ids, picture_ids], dim=1)


def share_an_id(row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """Tell which rows and columns have an id of the same kind in common.

    Args:
        row_ids: (R,), or (R, K) with K kinds of ids.
        column_ids: (C,), or (C, K).

    Returns:
        (R, C) bool.

    Example:
        >>> ids = join_ids(torch.tensor([4, 5, 4]), torch.tensor([7, 7, 8]))
        >>> share_an_id(ids[:1], ids)
        tensor([[True, True, True]])
        >>> share_an_id(ids[1:2], ids)
        tensor([[ True,  True, False]])
    """
    if row_ids.ndim == 1:
        return row_ids[:, None] == column_ids[None, :]
    rows, columns = row_ids.T.contiguous(), column_ids.T.contiguous()
    same = rows[0, :, None] == columns[0, None, :]
    for kind in range(1, len(rows)):
        same = same | (rows[kind, :, None] == columns[kind, None, :])
    return same
