"""Gaussian kernel of the pairs of one tile, and its sum; no ranks, no autograd."""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.losses.kernels.pair_terms import Kernel, choose_kernel, compiled
from dist_siglip.losses.kernels.tiles import (
    TileBuffers,
    logits_dtype,
    product_dtype,
    similarity,
    sum_dtype,
)


class GaussianTile(NamedTuple):
    """Gaussian kernel of one tile.

    Attributes:
        kernel: (rows, columns), in ``product_dtype``.
        row_sums: (rows,), sums of ``kernel`` as it is, rounded.
        column_sums: (columns,), likewise.
    """

    kernel: Tensor
    row_sums: Tensor
    column_sums: Tensor


class GaussianTiles:
    """exp(-2 |row - column|^2) on the tiles of one pass, and its sum.

    The gradient of the sum by row i is -4 sum_j kernel[i, j] (row i - column j), the difference of
    a sum of the kernel times the row and a product of the kernel with the columns.

    Args:
        features: any features of the pass; give device and dtype.
        largest: most rows and columns of a tile.
        kernel: who computes the terms, see ``choose_kernel``.

    Example:
        >>> eye = torch.eye(2)
        >>> tiles = GaussianTiles(eye, (2, 2))
        >>> tile = tiles.tile(eye, eye, diagonal=0)
        >>> bool(torch.isclose(tiles.value(), 2 * torch.exp(torch.tensor(-4.0).double())))
        True

    Source:
        Wang and Isola 2020, arXiv:2005.10242, with t = 2.
    """

    def __init__(
        self, features: Tensor, largest: tuple[int, int], *, kernel: Kernel = "auto"
    ) -> None:
        self._kernel = choose_kernel(kernel, features)
        self._value = torch.zeros((), dtype=sum_dtype(features.device), device=features.device)
        self._block_sums: Tensor | None = None
        if self._kernel == "triton":
            from dist_siglip.losses.kernels import triton_terms

            self._triton = triton_terms
            self._buffers = TileBuffers(largest, features, product_dtype(features))
            self._block_sums = triton_terms.sums_buffer(
                *largest, triton_terms.SUMS_BLOCK, features.device
            )

    def tile(
        self, row_features: Tensor, column_features: Tensor, *, diagonal: int | None
    ) -> GaussianTile:
        """Add one tile to the sum; return its kernel and what that sums to.

        Args:
            row_features: (rows, D).
            column_features: (columns, D).
            diagonal: pairs (i, i + diagonal) are left out, as 0; None for none.
        """
        dtype = logits_dtype(row_features)
        row_squares = row_features.to(dtype).square().sum(dim=1)
        column_squares = column_features.to(dtype).square().sum(dim=1)
        if self._block_sums is not None:
            shape = (len(row_features), len(column_features))
            products = similarity(row_features, column_features, out=self._buffers.logits(*shape))
            narrow = self._buffers.narrow(*shape)
            sums = self._triton.write_gaussian(
                products, narrow, self._block_sums, row_squares, column_squares, diagonal
            )
            return GaussianTile(narrow, *sums)
        value, *tile = (compiled(_gaussian) if self._kernel == "compiled" else _gaussian)(
            similarity(row_features, column_features),
            row_squares,
            column_squares,
            diagonal,
            product_dtype(row_features),
        )
        self._value += value
        return GaussianTile(*tile)

    def value(self) -> Tensor:
        """Return the sum over the pairs of all tiles so far."""
        return self._value if self._block_sums is None else self._block_sums[:, 0].sum()


def _gaussian(
    products: Tensor,
    row_squares: Tensor,
    column_squares: Tensor,
    diagonal: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>, below zero only by rounding.
    squares = row_squares[:, None] + column_squares
    kernel = squares.sub_(products, alpha=2).clamp_min_(0).mul_(-2).exp_()
    if diagonal is not None:
        kernel.diagonal(diagonal).zero_()
    value = kernel.sum()
    # One rounding for both terms of the difference, which cancel for near points.
    kernel = kernel.to(dtype)
    wide = products.dtype
    return value, kernel, kernel.sum(dim=1, dtype=wide), kernel.sum(dim=0, dtype=wide)
