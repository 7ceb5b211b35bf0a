"""Sigmoid loss on one tile of pairs, with its derivative; no ranks, no autograd.

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

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.losses.kernels.pair_terms import (
    Duplicates,
    Kernel,
    choose_kernel,
    compiled,
    pair_terms,
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


class TileBuffers:
    """Memory for the tiles of one pass, allocated once and overwritten by every tile.

    Args:
        largest: most rows and columns of a tile.
        features: any features; give device and dtype.
        derivative_dtype: dtype of the derivative that is written beside the logits; None if it
            is written over them or not at all.
    """

    def __init__(
        self, largest: tuple[int, int], features: Tensor, derivative_dtype: torch.dtype | None
    ) -> None:
        rows, columns = largest
        self._logits = features.new_empty(rows * columns, dtype=logits_dtype(features))
        on_cpu = features.device.type == "cpu"
        needs_scratch = on_cpu and not uses_onednn(features)
        self._scratch = torch.empty_like(self._logits) if needs_scratch else None
        if on_cpu and features.dtype in _HALF and derivative_dtype is None:
            derivative_dtype = features.dtype  # which the products are computed in
        self._narrow: Tensor | None = None
        if derivative_dtype not in (None, self._logits.dtype):
            self._narrow = features.new_empty(rows * columns, dtype=derivative_dtype)
        self._views: dict[tuple[str, int, int], Tensor] = {}

    def tensors(self) -> tuple[Tensor, ...]:
        """All memory."""
        found = (self._logits, self._scratch, self._narrow)
        return tuple(tensor for tensor in found if tensor is not None)

    def logits(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) in the logits' dtype."""
        return self._view("logits", self._logits, rows, columns)

    def scratch(self, rows: int, columns: int) -> Tensor:
        """As ``logits``; on a CPU only, where oneDNN does not bring its own."""
        assert self._scratch is not None
        return self._view("scratch", self._scratch, rows, columns)

    def narrow(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) in the derivative's dtype; the logits themselves if that is theirs."""
        if self._narrow is None:
            return self.logits(rows, columns)
        return self._view("narrow", self._narrow, rows, columns)

    def _view(self, name: str, memory: Tensor, rows: int, columns: int) -> Tensor:
        # Tiles have few shapes, and a look is cheaper than two views.
        view = self._views.get((name, rows, columns))
        if view is None:
            view = self._views[name, rows, columns] = memory[: rows * columns].view(rows, columns)
        return view


def logits_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype of logits and accumulators for these features."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


class SigmoidSums(NamedTuple):
    """Sums over all tiles of a pass.

    Attributes:
        value: (), of softplus(-y * logit).
        derivative: (), of d value / d logit.
        scale: (), of d value / d logit * similarity; None where nobody has summed it.
        duplicate_pairs: (), int64, pairs that share an id off the diagonal; None without ids.
    """

    value: Tensor
    derivative: Tensor
    scale: Tensor | None
    duplicate_pairs: Tensor | None


class SigmoidTiles:
    """Sigmoid loss on the tiles of one pass: sums that grow, and the derivative of each tile.

    With y[i, j] = +1 for a positive, else -1, and w[i, j] = 0 for a masked pair, else 1:

        value = sum_ij w[i, j] * softplus(-y[i, j] * logits[i, j])
        logits = logit_scale * row_features @ column_features.T + logit_bias

    Pair (i, i + diagonal) of a tile is a positive. Other pairs are negatives, unless they share
    an id: then ``duplicates`` says whether they are positives, masked or negatives; or unless a
    matrix of relevance says that they are positives.

    Args:
        features: any features of the pass; give device and dtype.
        largest: most rows and columns of a tile.
        logit_scale: () in the logits' dtype, the multiplier.
        logit_bias: () in the logits' dtype, added.
        kernel: who computes the terms, see ``choose_kernel``.
        with_derivative: whether the derivatives are wanted.
        has_ids: whether tiles come with ids.
        duplicates: see above.
        derivative_dtype: of the derivative; None for ``product_dtype``.

    Attributes:
        sums_scale: whether the sums have one for the derivative by the scale.

    Example:
        >>> one = torch.ones(1, 1)
        >>> tiles = SigmoidTiles(one, (1, 1), torch.tensor(2.0), torch.tensor(-2.0))
        >>> tiles.derivative(one, one, diagonal=0)
        tensor([[-0.5000]])
        >>> round(tiles.sums().value.item(), 4)
        0.6931

    Source:
        Zhai et al. 2023, arXiv:2303.15343, Algorithm 1 (the bias is added).
    """

    def __init__(
        self,
        features: Tensor,
        largest: tuple[int, int],
        logit_scale: Tensor,
        logit_bias: Tensor,
        *,
        kernel: Kernel = "auto",
        with_derivative: bool = True,
        has_ids: bool = False,
        duplicates: Duplicates = "positive",
        derivative_dtype: torch.dtype | None = None,
    ) -> None:
        # One number on the host is none that a kernel can read.
        self._scale, self._bias = (x.to(features.device) for x in (logit_scale, logit_bias))
        self._scale_value: float | None = None  # on a CPU
        self._duplicates: Duplicates = duplicates
        self._dtype: torch.dtype | None = None
        if with_derivative:
            self._dtype = derivative_dtype or product_dtype(features)
        self._kernel = choose_kernel(kernel, features)
        self.sums_scale = self._kernel == "triton" and with_derivative
        device = features.device
        beside = self._dtype if self._kernel == "triton" else None
        self._buffers = TileBuffers(largest, features, beside)
        self._value = torch.zeros((), dtype=sum_dtype(device), device=device)
        self._derivative_sum = torch.zeros_like(self._value)
        self._duplicate_pairs: Tensor | None = None
        if has_ids:
            self._duplicate_pairs = torch.zeros((), dtype=torch.int64, device=device)
        self._block_sums: Tensor | None = None
        if self._kernel == "triton":
            from dist_siglip.losses.kernels import triton_terms

            self._triton = triton_terms
            self._block_sums = triton_terms.sums_buffer(*largest, triton_terms.TERMS_BLOCK, device)

    def derivative(
        self,
        row_features: Tensor,
        column_features: Tensor,
        *,
        diagonal: int | None,
        row_ids: Tensor | None = None,
        column_ids: Tensor | None = None,
        relevant: Tensor | None = None,
    ) -> Tensor | None:
        """Add one tile to the sums; return (rows, columns), d value / d logit, until the next.

        Args:
            row_features: (rows, D).
            column_features: (columns, D).
            diagonal: see above; None for a tile without matching pairs.
            row_ids: (rows,) or (rows, kinds), integers; None for no ids.
            column_ids: likewise of the columns.
            relevant: (rows, columns), bool, further positives; None for none.
        """
        shape = (row_features.shape[0], column_features.shape[0])
        on_cpu = row_features.device.type == "cpu"
        if self._block_sums is not None:
            products = similarity(row_features, column_features, out=self._buffers.logits(*shape))
            derivative = None if self._dtype is None else self._buffers.narrow(*shape)
            self._triton.add_sigmoid_terms(
                products,
                derivative,
                self._block_sums,
                self._scale,
                self._bias,
                row_ids,
                column_ids,
                diagonal,
                self._duplicates,
                relevant,
            )
            return derivative
        if self._kernel == "eager" and on_cpu and relevant is None:
            terms = pair_terms_in_place(
                *self._logits_and_scratch(row_features, column_features),
                row_ids,
                column_ids,
                diagonal=diagonal,
                duplicates=self._duplicates,
                with_derivative=self._dtype is not None,
            )
        else:
            terms = (compiled(pair_terms) if self._kernel == "compiled" else pair_terms)(
                similarity(row_features, column_features, out=self._buffers.logits(*shape)),
                self._scale,
                self._bias,
                row_ids,
                column_ids,
                diagonal,
                self._duplicates,
                self._dtype,
                relevant,
            )
        self._value += terms.value
        if self._duplicate_pairs is not None and terms.duplicate_pairs is not None:
            self._duplicate_pairs += terms.duplicate_pairs
        derivative = terms.derivative
        if derivative is None or terms.derivative_sum is None:
            return None
        self._derivative_sum += terms.derivative_sum
        if derivative.dtype != self._dtype:
            derivative = self._buffers.narrow(*shape).copy_(derivative)
        return derivative

    def replayed(self) -> tuple[Hashable, Sequence[Tensor]] | None:
        """Return settings and tensors that tiles depend on; None if they are more than launches."""
        if self._block_sums is None:
            return None
        settings = (self._dtype, self._duplicates)
        return settings, (self._scale, self._bias, self._block_sums, *self._buffers.tensors())

    def sums(self) -> SigmoidSums:
        """Return the sums over all tiles so far."""
        if self._block_sums is None:
            return SigmoidSums(self._value, self._derivative_sum, None, self._duplicate_pairs)
        value, by_bias, by_scale, duplicates = self._block_sums.sum(dim=0).unbind()
        counted = None if self._duplicate_pairs is None else duplicates.to(torch.int64)
        return SigmoidSums(value, by_bias, by_scale, counted)

    def _logits_and_scratch(
        self, row_features: Tensor, column_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of a tile and a tensor like them to overwrite, on a CPU."""
        shape = (row_features.shape[0], column_features.shape[0])
        logits = self._buffers.logits(*shape)
        if self._scale_value is None:
            self._scale_value = self._scale.item()
        scale = self._scale_value
        if uses_onednn(row_features):
            products = product(row_features, column_features)
            return torch.add(self._bias, products, alpha=scale, out=logits), products
        scratch = self._buffers.scratch(*shape)
        if row_features.dtype == logits.dtype:
            # The product's own pass multiplies and adds; it rounds once.
            torch.addmm(self._bias, row_features, column_features.T, alpha=scale, out=logits)
        else:
            logits.copy_(
                torch.mm(row_features, column_features.T, out=self._buffers.narrow(*shape))
            )
            torch.add(self._bias, logits, alpha=scale, out=logits)
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
