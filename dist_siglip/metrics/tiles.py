"""The rectangles in which a similarity matrix is visited, so that it never exists as a whole.

Similarities are computed in float64 whatever the features' dtype: a float32 product of the same
two vectors differs in its last digits with the shape of the rectangle it is computed in, so ties
would be decided by chunk sizes and by the number of ranks. bfloat16 features stay as they are;
only their products are wide. (Autocast and TF32 leave float64 alone.)
"""

from collections.abc import Iterator

from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import DEFAULT_CHUNK_ROWS
from dist_siglip.losses.kernels import tiles as kernel_tiles

# Rows that sums over rows make wide at once: 75 MB at D = 1152.
_SUMMED_ROWS = 8192


def tile_slices(num_rows: int, num_columns: int, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into rectangles of at most ``chunk_rows`` rows and columns.

    Args:
        num_rows: rows of the matrix.
        num_columns: columns of the matrix.
        chunk_rows: longest side of a rectangle, at least 1.

    Yields:
        (rows, columns) of every rectangle, row by row; nothing for an empty matrix.

    Raises:
        UserError: if ``chunk_rows`` is below 1.

    Example:
        >>> [(r.start, r.stop, c.start, c.stop) for r, c in tile_slices(3, 2, 2)]
        [(0, 2, 0, 2), (2, 3, 0, 2)]
    """
    if chunk_rows < 1:
        raise UserError(f"chunk_rows ({chunk_rows}) must be at least 1; try {DEFAULT_CHUNK_ROWS}")
    # Those of the transposed matrix, whose columns come first.
    for columns, rows in kernel_tiles.tile_slices(num_columns, num_rows, (chunk_rows,) * 2):
        yield rows, columns


def row_slices(num_rows: int) -> Iterator[slice]:
    """Cut a matrix of features into parts that may be copied to float64.

    The matrix itself may be a file mapped into memory: what is live is one part.

    Args:
        num_rows: rows of the matrix.

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
        >>> import torch
        >>> exact_similarity(torch.eye(2), torch.tensor([[0.6, 0.8]])).shape
        torch.Size([2, 1])
    """
    return row_features.double() @ column_features.double().T
