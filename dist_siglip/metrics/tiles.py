"""The rectangles in which a similarity matrix is visited, so that it never exists as a whole.

Similarities are computed in float64 whatever the features' dtype: a float32 product of the same
two vectors differs in its last digits with the shape of the rectangle it is computed in, so ties
would be decided by chunk sizes and by the number of ranks. bfloat16 features stay as they are;
only their products are wide. (Autocast and TF32 leave float64 alone.)

Where only a comparison is wanted, float32 decides all that is further from its threshold than
float32 may err, and float64 the rest.

Nothing here, nor what a metric does in a rectangle, makes the host wait for a device: what must be
known of rectangles is read once for a shard.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import DEFAULT_CHUNK_ROWS
from dist_siglip.losses.kernels import tiles as kernel_tiles

# Rows that sums over rows make wide at once: 75 MB at D = 1152.
_SUMMED_ROWS = 8192


_GPU_SIDE = 8192  # 512 MiB of float64


def tile_side(chunk_rows: int | None, device: torch.device) -> int:
    """Longest side of a rectangle: 1,024 on a CPU and 8,192 elsewhere, unless it is given.

    Raises:
        UserError: if it is below 1.

    Example:
        >>> tile_side(None, torch.device("cpu")), tile_side(None, torch.device("cuda"))
        (1024, 8192)
    """
    if chunk_rows is None:
        return DEFAULT_CHUNK_ROWS if device.type == "cpu" else _GPU_SIDE
    if chunk_rows < 1:
        raise UserError(f"chunk_rows ({chunk_rows}) must be at least 1; try {DEFAULT_CHUNK_ROWS}")
    return chunk_rows


def tile_slices(num_rows: int, num_columns: int, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into rectangles of at most ``chunk_rows`` rows and columns.

    Args:
        num_rows: rows of the matrix.
        num_columns: columns of the matrix.
        chunk_rows: longest side of a rectangle, at least 1; see ``tile_side``.

    Yields:
        (rows, columns) of every rectangle, row by row; nothing for an empty matrix.

    Example:
        >>> [(r.start, r.stop, c.start, c.stop) for r, c in tile_slices(3, 2, 2)]
        [(0, 2, 0, 2), (2, 3, 0, 2)]
    """
    # Those of the transposed matrix, whose columns come first.
    for columns, rows in kernel_tiles.tile_slices(num_columns, num_rows, (chunk_rows,) * 2):
        yield rows, columns


def row_slices(num_rows: int) -> Iterator[slice]:
    """Cut a matrix of features into parts that may be copied to float64.

    The matrix itself may be a file mapped into memory: what is live is one part.

    Yields:
        The rows of every part, in order; nothing for an empty matrix.

    Example:
        >>> [(rows.start, rows.stop) for rows in row_slices(10_000)]
        [(0, 8192), (8192, 10000)]
    """
    for row in range(0, num_rows, _SUMMED_ROWS):
        yield slice(row, min(row + _SUMMED_ROWS, num_rows))


def exact_similarity(row_features: Tensor, column_features: Tensor) -> Tensor:
    """Inner products of all rows of one matrix with all rows of another, in float64.

    Args:
        row_features: (R, D).
        column_features: (C, D).

    Returns:
        (R, C) float64; cosines if both are L2-normalised.

    Example:
        >>> exact_similarity(torch.eye(2), torch.tensor([[0.6, 0.8]])).shape
        torch.Size([2, 1])
    """
    return row_features.double() @ column_features.double().T


def squared_norms(features: Tensor) -> Tensor:
    """Squared lengths of the rows of (B, D), (B,) float64.

    Example:
        >>> squared_norms(torch.tensor([[3.0, 4.0]]))
        tensor([25.], dtype=torch.float64)
    """
    parts = [features[rows].double().square().sum(dim=1) for rows in row_slices(len(features))]
    return torch.cat(parts) if parts else features.new_empty(0, dtype=torch.float64)


def narrow_similarity(row_features: Tensor, column_features: Tensor) -> Tensor:
    """Inner products in float32, as ``similarity``, off by ``narrow_error`` at most.

    Neither autocast nor TF32 has a part in it, whatever is set.
    """
    with torch.autocast(row_features.device.type, enabled=False), _whole_float32():
        return row_features.float() @ column_features.float().T


def narrow_error(num_columns: int) -> float:
    """Error of a float32 inner product of D numbers, over the product of the vectors' lengths.

        (D + 2) u / (1 - (D + 2) u),  u = 2^-24

    in whatever order it is summed; two of the roundings are those of wider features.

    Source:
        Higham 2002, Accuracy and Stability of Numerical Algorithms, equation 3.4.
    """
    rounding = (num_columns + 2) * 2.0**-24
    return rounding / (1 - rounding)


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Multiply float32 matrices as float32 inside the block."""
    libraries: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # its stubs lack mkldnn's
    before = [library.fp32_precision for library in libraries]
    try:
        for library in libraries:
            library.fp32_precision = "ieee"
        yield
    finally:
        for library, precision in zip(libraries, before, strict=True):
            library.fp32_precision = precision
