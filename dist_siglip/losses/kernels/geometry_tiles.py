"""The Gaussian kernel on one rectangle (tile) of distances; no ranks, no autograd."""

from typing import NamedTuple

from torch import Tensor

from dist_siglip.losses.kernels.tiles import logits_dtype, similarity
from dist_siglip.losses.ring_pass import product_dtype


class KernelTile(NamedTuple):
    """What one tile says.

    Attributes:
        value: (), sum of the kernel over the pairs of the tile.
        row_pull: (rows, D), sum_j kernel[i, j] * (row i - column j); None if not asked for.
            Times -4 it is the gradient of ``value`` by row i.
        column_pull: (columns, D), the same for columns; None if not asked for.
    """

    value: Tensor
    row_pull: Tensor | None
    column_pull: Tensor | None


def kernel_tile(
    row_features: Tensor,
    column_features: Tensor,
    *,
    without_diagonal: bool,
    with_row_pull: bool,
    with_column_pull: bool,
) -> KernelTile:
    """Sum exp(-2 |row - column|^2) over the pairs of one tile.

    Args:
        row_features: (rows, D).
        column_features: (columns, D).
        without_diagonal: whether pairs (i, i) of this tile are left out.
        with_row_pull: whether the gradient by the rows is wanted.
        with_column_pull: whether the gradient by the columns is wanted.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> tile = kernel_tile(eye, eye, without_diagonal=True, with_row_pull=True,
        ...                    with_column_pull=False)
        >>> bool(torch.isclose(tile.value, torch.tensor(2.0) * torch.exp(torch.tensor(-4.0))))
        True

    Source:
        Wang and Isola 2020, arXiv:2005.10242, with t = 2.
    """
    dtype = logits_dtype(row_features)
    rows, columns = row_features.to(dtype), column_features.to(dtype)
    # |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>, below zero only by rounding.
    squares = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    kernel = (
        squares.sub_(similarity(row_features, column_features), alpha=2)
        .clamp_min_(0)
        .mul_(-2)
        .exp_()
    )
    if without_diagonal:
        kernel.fill_diagonal_(0)
    value = kernel.sum()
    # One rounding for both terms of the difference, which cancel for near points.
    kernel = kernel.to(product_dtype(row_features))
    row_pull = column_pull = None
    if with_row_pull:
        row_pull = kernel.sum(dim=1, dtype=dtype)[:, None] * rows
        row_pull -= kernel @ column_features.to(kernel.dtype)
    if with_column_pull:
        column_pull = kernel.sum(dim=0, dtype=dtype)[:, None] * columns
        column_pull -= kernel.T @ row_features.to(kernel.dtype)
    return KernelTile(value, row_pull, column_pull)
