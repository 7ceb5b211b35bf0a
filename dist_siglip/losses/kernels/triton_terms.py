"""Launches of the Triton kernels of ``triton_kernels``, on tensors.

Imported only where Triton is there; ``TRITON_INTERPRET=1`` runs the kernels on a CPU.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from dist_siglip.losses.kernels.triton_kernels import (
    add_log_sums,
    gaussian,
    sigmoid_terms,
    softmax_derivative,
    softmax_sums,
)

# Rows and columns of a block, and warps: 16 pairs per thread, whose registers the tests bound.
TERMS_BLOCK = (8, 256)
SUMS_BLOCK = (32, 128)
VECTOR_BLOCK = 256
NUM_WARPS = 4
# Pairs of equal ids off the diagonal.
DUPLICATE_CODES = {"negative": 0, "positive": 1, "masked": 2}
# What a program sums.
SUMS = ("value", "derivative", "scale", "duplicates")


def is_interpreted() -> bool:
    """Whether the kernels run on a CPU, in Python."""
    return not isinstance(sigmoid_terms, triton.runtime.JITFunction)


def num_blocks(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks a tile has, by rows and by columns.

    Example:
        >>> num_blocks(9, 256, (8, 256))
        (2, 1)
    """
    return -(-rows // block[0]), -(-columns // block[1])


def sums_buffer(rows: int, columns: int, block: tuple[int, int], device: torch.device) -> Tensor:
    """Return zeros for the sums of a pass: a row for each block of its largest tile."""
    by_rows, by_columns = num_blocks(rows, columns, block)
    return torch.zeros(max(by_rows * by_columns, 1), len(SUMS), dtype=torch.float64, device=device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its first argument; without a block it is none."""
    if not all(grid):
        return
    device = arguments[0].device
    # Triton launches on the current device, whatever tensors are on.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*arguments, **constants, num_warps=NUM_WARPS)


def add_sigmoid_terms(
    similarity: Tensor,
    derivative: Tensor | None,
    sums: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    diagonal: int | None,
    duplicates: str,
    relevant: Tensor | None = None,
) -> None:
    """Add the terms of a tile to ``sums`` and write its derivative; one launch.

    Args:
        similarity: (rows, columns), contiguous, float32.
        derivative: the same shape, of any dtype, may be ``similarity``; None for none.
        sums: of ``sums_buffer`` with ``TERMS_BLOCK``.
        scale: (), float32.
        bias: (), float32.
        row_ids: (rows,) or (rows, kinds); None for none.
        column_ids: likewise of the columns.
        diagonal: pairs (i, i + diagonal) are positives; None for none.
        duplicates: what pairs that share an id off the diagonal are.
        relevant: (rows, columns), bool, further positives; None for none.
    """
    rows, columns = similarity.shape
    kinds = 0 if row_ids is None else row_ids[:1].numel()
    if row_ids is not None and column_ids is not None:
        row_ids, column_ids = row_ids.contiguous(), column_ids.contiguous()
    if relevant is not None and relevant.stride(1) != 1:
        relevant = relevant.contiguous()
    launch(
        sigmoid_terms,
        num_blocks(rows, columns, TERMS_BLOCK),
        similarity,
        derivative,
        sums,
        scale,
        bias,
        row_ids,
        column_ids,
        relevant,
        rows,
        columns,
        0 if relevant is None else relevant.stride(0),
        diagonal or 0,
        WITH_DERIVATIVE=derivative is not None,
        HAS_DIAGONAL=diagonal is not None,
        ID_KINDS=kinds,
        DUPLICATES=DUPLICATE_CODES[duplicates] if kinds else 0,
        HAS_RELEVANT=relevant is not None,
        BLOCK_ROWS=TERMS_BLOCK[0],
        BLOCK_COLUMNS=TERMS_BLOCK[1],
    )


def add_softmax_sums(
    similarity: Tensor,
    row_totals: Tensor,
    column_totals: Tensor,
    positives: Tensor,
    scale: Tensor,
    diagonal: int | None,
) -> None:
    """Add the negatives of a tile to log-sum-exps of its rows and columns; three launches.

    Args:
        similarity: (rows, columns), contiguous, float32.
        row_totals: (rows,), float32.
        column_totals: (columns,), float32.
        positives: (rows,), gets the logits of the positives that are in the tile.
        scale: (), float32.
        diagonal: pairs (i, i + diagonal) are positives; None for none.
    """
    rows, columns = similarity.shape
    grid = num_blocks(rows, columns, SUMS_BLOCK)
    row_parts = similarity.new_empty(grid[1], rows)
    column_parts = similarity.new_empty(grid[0], columns)
    launch(
        softmax_sums,
        grid,
        similarity,
        row_parts,
        column_parts,
        positives,
        scale,
        rows,
        columns,
        diagonal or 0,
        HAS_DIAGONAL=diagonal is not None,
        BLOCK_ROWS=SUMS_BLOCK[0],
        BLOCK_COLUMNS=SUMS_BLOCK[1],
    )
    for parts, totals in ((row_parts, row_totals), (column_parts, column_totals)):
        num_parts, size = parts.shape
        if num_parts:
            grid_of_totals = (-(-size // VECTOR_BLOCK),)
            launch(add_log_sums, grid_of_totals, parts, totals, num_parts, size, BLOCK=VECTOR_BLOCK)


def write_softmax_derivative(
    similarity: Tensor,
    derivative: Tensor,
    sums: Tensor | None,
    row_sums: Tensor,
    column_sums: Tensor,
    positive_derivative: Tensor,
    scale: Tensor,
    diagonal: int | None,
) -> None:
    """Write the derivative of both directions by the logits of a tile; one launch.

    Args:
        similarity: (rows, columns), contiguous, float32.
        derivative: the same shape, of any dtype, may be ``similarity``.
        sums: of ``sums_buffer`` with ``TERMS_BLOCK``, gets the derivative by the scale; or None.
        row_sums: (rows,), float32, log-sum-exp of the whole row.
        column_sums: (columns,), likewise.
        positive_derivative: (rows,), of the positive of each row.
        scale: (), float32.
        diagonal: pairs (i, i + diagonal) are positives; None for none.
    """
    rows, columns = similarity.shape
    launch(
        softmax_derivative,
        num_blocks(rows, columns, TERMS_BLOCK),
        similarity,
        derivative,
        sums,
        row_sums.contiguous(),
        column_sums.contiguous(),
        positive_derivative.contiguous(),
        scale,
        rows,
        columns,
        diagonal or 0,
        HAS_DIAGONAL=diagonal is not None,
        WITH_SCALE=sums is not None,
        BLOCK_ROWS=TERMS_BLOCK[0],
        BLOCK_COLUMNS=TERMS_BLOCK[1],
    )


def write_gaussian(
    similarity: Tensor,
    kernel: Tensor,
    sums: Tensor,
    row_squares: Tensor,
    column_squares: Tensor,
    diagonal: int | None,
) -> tuple[Tensor, Tensor]:
    """Write the Gaussian kernel of a tile; return its sums by rows and by columns.

    Args:
        similarity: (rows, columns), contiguous, float32.
        kernel: the same shape, of any dtype, may be ``similarity``.
        sums: of ``sums_buffer`` with ``SUMS_BLOCK``, gets the sum before rounding.
        row_squares: (rows,), float32, squared norms.
        column_squares: (columns,), likewise.
        diagonal: pairs (i, i + diagonal) are 0; None for none.
    """
    rows, columns = similarity.shape
    grid = num_blocks(rows, columns, SUMS_BLOCK)
    row_parts = similarity.new_empty(grid[1], rows)
    column_parts = similarity.new_empty(grid[0], columns)
    launch(
        gaussian,
        grid,
        similarity,
        kernel,
        sums,
        row_squares,
        column_squares,
        row_parts,
        column_parts,
        rows,
        columns,
        diagonal or 0,
        HAS_DIAGONAL=diagonal is not None,
        BLOCK_ROWS=SUMS_BLOCK[0],
        BLOCK_COLUMNS=SUMS_BLOCK[1],
    )
    return row_parts.sum(dim=0), column_parts.sum(dim=0)


def try_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Run every kernel once on a small tile, plain and with all it can do.

    Raises:
        Exception: whatever stands against building or launching one.
    """
    side = 16  # of a usual tile: sizes that are no multiples have kernels of their own
    one = torch.zeros(side, device=device)
    tile = torch.zeros(side, side, device=device)
    narrow = tile.to(dtype)
    ids = torch.zeros(side, 2, dtype=torch.int64, device=device)
    sums = sums_buffer(side, side, TERMS_BLOCK, device)
    scalars = (one[0], one[0])
    add_sigmoid_terms(tile, narrow, sums, *scalars, None, None, None, "negative")
    marks = torch.ones(side, side, dtype=torch.bool, device=device)
    add_sigmoid_terms(tile, narrow, sums, *scalars, ids, ids, 0, "positive", marks)
    for diagonal in (None, 0):
        add_softmax_sums(tile, one, one, one, one[0], diagonal)
        write_softmax_derivative(tile, narrow, sums, one, one, one, one[0], diagonal)
        write_gaussian(tile, narrow, sums, one, one, diagonal)
