"""Sigmoid loss and Gaussian kernel on one tile of pairs, with gradients; no ranks, no autograd.

A sigmoid tile needs nothing from any other tile: its value and its derivative with respect to
every logit depend on one pair each. So one visit gives the loss of the tile and all gradients.

Numbers: the product of features runs in their dtype; logits, values and derivatives are float32
(float64 for float64 features). A positive's value is softplus(-z), never softplus(z) - z, which
cancels for large z, and its derivative is -sigmoid(-z), never sigmoid(z) - 1; ``pair_terms`` says
how sums keep their digits. ``similarity`` never rounds a product to half precision, which a
softmax and a distance need: at a scale of 100 the bfloat16 rounding of a cosine of 0.6 moves its
logit by up to 0.2 and its softmax by a fifth; that of the features averages out over their width.

Products of float32 on a CPU take the faster of PyTorch's two libraries:
torch.mm gives float32 to MKL, which leaves the AVX-512 units of AMD processors idle; oneDNN, which
PyTorch brings along too, uses them: measured 2.1 times faster on a Zen 5 core (1024 x 1024 x 512).
Both compute in float32. The choice depends on the processor alone, never on a clock, so that a
machine repeats its numbers.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.losses.kernels.pair_terms import (
    Duplicates,
    Terms,
    fused_pair_terms,
    pair_terms_in_place,
)

_CPU_INFO = Path("/proc/cpuinfo")


def uses_onednn(features: Tensor) -> bool:
    """Whether ``product`` is the way to multiply matrices like these."""
    return features.dtype == torch.float32 and features.device.type == "cpu" and _onednn_is_faster()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right.T by oneDNN, for float32 on a CPU.

    Args:
        left: (M, K); copied if it is transposed.
        right: (N, K); taken as it lies.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return result


@lru_cache(maxsize=1)
def _onednn_is_faster() -> bool:
    is_there = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (is_there and has_avx512 and _CPU_INFO.is_file()):
        return False
    return "AuthenticAMD" in _CPU_INFO.read_text(encoding="utf-8", errors="replace")


def add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
    """Add left @ right to ``total``, accumulating in its dtype.

    Args:
        total: (M, N).
        left: (M, K).
        right: (K, N).
        overwrite: write the product in place of the sum; what ``total`` holds does not count.
    """
    if uses_onednn(left) and total.dtype == left.dtype:
        added = product(left, right.T)
        total.copy_(added) if overwrite else total.add_(added)
    elif left.dtype == total.dtype:
        torch.mm(left, right, out=total) if overwrite else total.addmm_(left, right)
    elif left.device.type == "cuda" and total.dtype == torch.float32:
        # Tensor cores sum in float32: the product is not rounded before it is added.
        if overwrite:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        elif _adds_half_products(left.dtype, left.device):
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        else:
            total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        added = left @ right
        total.copy_(added) if overwrite else total.add_(added)


@lru_cache
def _adds_half_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this PyTorch adds a product of half-precision matrices to a float32 matrix."""
    half = torch.zeros(8, 8, dtype=dtype, device=device)
    wide = torch.zeros(8, 8, device=device)
    try:
        torch.addmm(wide, half, half, out_dtype=wide.dtype, out=wide)
    except (RuntimeError, TypeError):  # older ones want the sum in the factors' dtype
        return False
    return True


def inner_product(features: Tensor, gradient: Tensor) -> Tensor:
    """Return the sum over all elements of features * gradient, in ``sum_dtype``."""
    total = gradient.new_zeros((), dtype=sum_dtype(features.device))
    # In pieces: the products of all rows would be as large as the gradient, and leave the caches.
    step = 256 if features.device.type == "cpu" else 4096
    for rows in range(0, features.shape[0], step):
        some = slice(rows, rows + step)
        total += (features[some] * gradient[some]).sum(dim=1).sum(dtype=total.dtype)
    return total


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype for sums over many tiles; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def product_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype in which a tile's derivative meets the features.

    Derivatives of negatives can be below the smallest fp16 number.
    """
    return torch.float32 if features.dtype == torch.float16 else features.dtype


def tile_slices(
    num_rows: int, num_columns: int, tile_shape: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    """Cut a rectangle into tiles of at most ``tile_shape`` rows and columns, column by column.

    Example:
        >>> [(rows.start, columns.start) for rows, columns in tile_slices(3, 4, (2, 3))]
        [(0, 0), (2, 0), (0, 3), (2, 3)]
    """
    tile_rows, tile_columns = tile_shape
    for column in range(0, num_columns, tile_columns):
        for row in range(0, num_rows, tile_rows):
            yield (
                slice(row, min(row + tile_rows, num_rows)),
                slice(column, min(column + tile_columns, num_columns)),
            )


_HALF = (torch.bfloat16, torch.float16)


class SigmoidTile(NamedTuple):
    """Sums and derivative of one tile.

    Attributes:
        value: (), sum over the pairs of the tile of softplus(-y * logit).
        derivative: (rows, columns), d value / d logit, in ``product_dtype``; None if not asked for.
        derivative_sum: (), the sum of the derivative; None if not asked for.
        duplicate_pairs: (), int64, pairs that share an id off the diagonal; None without ids.
    """

    value: Tensor
    derivative: Tensor | None
    derivative_sum: Tensor | None
    duplicate_pairs: Tensor | None


class TileBuffers:
    """Memory for the tiles of one pass, allocated once and overwritten by every tile.

    Args:
        rows: most rows of a tile.
        columns: most columns of a tile.
        features: any features; give device and dtype.
    """

    def __init__(self, rows: int, columns: int, features: Tensor) -> None:
        wide = logits_dtype(features)
        self._logits = features.new_empty(rows * columns, dtype=wide)
        on_cpu = features.device.type == "cpu"
        needs_scratch = on_cpu and not uses_onednn(features)
        self._scratch = torch.empty_like(self._logits) if needs_scratch else None
        is_half = on_cpu and features.dtype in _HALF
        self._narrow = features.new_empty(rows * columns) if is_half else None

    def logits(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) in the logits' dtype."""
        return self._logits[: rows * columns].view(rows, columns)

    def scratch(self, rows: int, columns: int) -> Tensor:
        """As ``logits``; on a CPU only, where oneDNN does not bring its own."""
        assert self._scratch is not None
        return self._scratch[: rows * columns].view(rows, columns)

    def narrow(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) in the dtype of half-precision features; on a CPU only."""
        assert self._narrow is not None
        return self._narrow[: rows * columns].view(rows, columns)


def logits_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype of logits and accumulators for these features."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def sigmoid_tile(
    row_features: Tensor,
    column_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    diagonal: int | None,
    with_derivative: bool,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    duplicates: Duplicates = "positive",
    buffers: TileBuffers | None = None,
) -> SigmoidTile:
    """Sum the sigmoid loss over the pairs of one tile.

    With y[i, j] = +1 for a positive, else -1, and w[i, j] = 0 for a masked pair, else 1:

        value = sum_ij w[i, j] * softplus(-y[i, j] * logits[i, j])
        logits = logit_scale * row_features @ column_features.T + logit_bias

    Pair (i, i + diagonal) of a tile is a positive. Other pairs are negatives, unless they share
    an id: then ``duplicates`` says whether they are positives, masked or negatives.

    Args:
        row_features: (rows, D).
        column_features: (columns, D).
        logit_scale: () in the logits' dtype, the multiplier.
        logit_bias: () in the logits' dtype, added.
        diagonal: see above; None for a tile of negatives.
        with_derivative: whether the derivative is wanted.
        row_ids: (rows,) or (rows, kinds), integers; None for no ids.
        column_ids: likewise of the columns.
        duplicates: see above.
        buffers: memory to use; the derivative then lives until the next tile.

    Returns:
        A ``SigmoidTile``; sums, not means.

    Example:
        >>> one = torch.ones(1, 1)
        >>> tile = sigmoid_tile(one, one, torch.tensor(2.0), torch.tensor(-2.0),
        ...                     diagonal=0, with_derivative=True)
        >>> round(tile.value.item(), 4), tile.derivative
        (0.6931, tensor([[-0.5000]]))

    Source:
        Zhai et al. 2023, arXiv:2303.15343, Algorithm 1 (the bias is added).
    """
    shape = (row_features.shape[0], column_features.shape[0])
    if buffers is None:
        buffers = TileBuffers(*shape, row_features)
    narrow_dtype = product_dtype(row_features)
    if row_features.device.type != "cpu":
        terms: Terms = fused_pair_terms()(
            similarity(row_features, column_features, out=buffers.logits(*shape)),
            logit_scale,
            logit_bias,
            row_ids,
            column_ids,
            diagonal,
            duplicates,
            narrow_dtype if with_derivative else None,
        )
        return SigmoidTile(*terms)
    terms = pair_terms_in_place(
        *_logits_and_scratch(row_features, column_features, logit_scale, logit_bias, buffers),
        row_ids,
        column_ids,
        diagonal=diagonal,
        duplicates=duplicates,
        with_derivative=with_derivative,
    )
    derivative = terms.derivative
    if derivative is not None and derivative.dtype != narrow_dtype:
        derivative = buffers.narrow(*shape).copy_(derivative)
    return SigmoidTile(terms.value, derivative, terms.derivative_sum, terms.duplicate_pairs)


def _logits_and_scratch(
    row_features: Tensor,
    column_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    buffers: TileBuffers,
) -> tuple[Tensor, Tensor]:
    """Return the logits of a tile and a tensor like them to overwrite, on a CPU."""
    shape = (row_features.shape[0], column_features.shape[0])
    logits = buffers.logits(*shape)
    scale = logit_scale.item()
    if uses_onednn(row_features):
        similarity = product(row_features, column_features)
        return torch.add(logit_bias, similarity, alpha=scale, out=logits), similarity
    scratch = buffers.scratch(*shape)
    if row_features.dtype == logits.dtype:
        # The product's own pass multiplies and adds; it rounds once.
        torch.addmm(logit_bias, row_features, column_features.T, alpha=scale, out=logits)
    else:
        logits.copy_(torch.mm(row_features, column_features.T, out=buffers.narrow(*shape)))
        torch.add(logit_bias, logits, alpha=scale, out=logits)
    return logits, scratch


def similarity(
    row_features: Tensor, column_features: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Return row_features @ column_features.T in the logits' dtype, summed and kept in it.

    Args:
        row_features: (rows, D).
        column_features: (columns, D), same dtype.
        out: (rows, columns) in the logits' dtype, to overwrite; None for new memory.

    Example:
        >>> half = torch.full((1, 3), 1 / 3, dtype=torch.bfloat16)
        >>> similarity(half, half)
        tensor([[0.3346]])
    """
    dtype = logits_dtype(row_features)
    if row_features.dtype != dtype and row_features.device.type == "cuda":
        # Tensor cores sum in float32; leave it so.
        return torch.mm(row_features, column_features.T, out_dtype=dtype, out=out)
    return torch.mm(row_features.to(dtype), column_features.to(dtype).T, out=out)


class KernelTile(NamedTuple):
    """Gaussian kernel of one tile.

    Attributes:
        value: (), its sum over the pairs of the tile.
        kernel: (rows, columns), in ``product_dtype``.
        row_sums: (rows,), sums of ``kernel`` as it is, rounded; None if not asked for.
        column_sums: (columns,), likewise.
    """

    value: Tensor
    kernel: Tensor
    row_sums: Tensor | None
    column_sums: Tensor | None


def kernel_tile(
    row_features: Tensor,
    column_features: Tensor,
    *,
    diagonal: int | None,
    with_row_sums: bool,
    with_column_sums: bool,
) -> KernelTile:
    """Return exp(-2 |row - column|^2) of the pairs of one tile.

    Its gradient by row i is -4 sum_j kernel[i, j] (row i - column j), the difference of a sum of
    the kernel times the row and a product of the kernel with the columns.

    Args:
        row_features: (rows, D).
        column_features: (columns, D).
        diagonal: pairs (i, i + diagonal) are left out, as 0; None for none.
        with_row_sums: whether sums over the columns are wanted.
        with_column_sums: whether sums over the rows are wanted.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> tile = kernel_tile(eye, eye, diagonal=0, with_row_sums=True, with_column_sums=False)
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
    if diagonal is not None:
        kernel.diagonal(diagonal).zero_()
    value = kernel.sum()
    # One rounding for both terms of the difference, which cancel for near points.
    kernel = kernel.to(product_dtype(row_features))
    return KernelTile(
        value,
        kernel,
        kernel.sum(dim=1, dtype=dtype) if with_row_sums else None,
        kernel.sum(dim=0, dtype=dtype) if with_column_sums else None,
    )
