"""Arithmetic of tiles: their edges, and products and sums in the right precision.

Products of float32 on a CPU take the faster of PyTorch's two libraries:
torch.mm gives float32 to MKL, which leaves the AVX-512 units of AMD processors idle; oneDNN, which
PyTorch brings along too, uses them: measured 2.1 times faster on a Zen 5 core (1024 x 1024 x 512).
Both compute in float32. The choice depends on the processor alone, never on a clock, so that a
machine repeats its numbers.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

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


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``total``, accumulating in its dtype."""
    if uses_onednn(left) and total.dtype == left.dtype:
        total += product(left, right.T)
    elif left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda" and total.dtype == torch.float32:
        # Tensor cores sum in float32: the product is not rounded before it is added.
        if _adds_half_products(left.dtype, left.device):
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        else:
            total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += left @ right


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


def tile_slices(num_rows: int, num_columns: int, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut a rectangle into tiles of at most chunk_rows on a side, column by column.

    Example:
        >>> [(rows.start, columns.start) for rows, columns in tile_slices(3, 4, 2)]
        [(0, 0), (2, 0), (0, 2), (2, 2)]
    """
    for column in range(0, num_columns, chunk_rows):
        for row in range(0, num_rows, chunk_rows):
            yield (
                slice(row, min(row + chunk_rows, num_rows)),
                slice(column, min(column + chunk_rows, num_columns)),
            )
