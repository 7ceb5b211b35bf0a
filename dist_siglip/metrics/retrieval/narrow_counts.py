"""Counts of similarities above thresholds, exact, most of them decided in float32.

A float32 product that is further from a threshold than it may err is on the side of it that the
float64 product is on. The others are few; they are listed, without asking how many there are, and
decided in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.metrics.tiles import narrow_similarity

_OPEN_PER_ROW = 4  # products of a rectangle that may be open, for each of its rows and columns


class Bounds(NamedTuple):
    """Thresholds of rows or columns, and what float32 products say of them.

    Attributes:
        exact: (R,) float64.
        above: (R,) float32; a product above it is at or above the threshold.
        below: (R,) float32; a product below it is below the threshold.
    """

    exact: Tensor
    above: Tensor
    below: Tensor

    @classmethod
    def of(cls, exact: Tensor, relative_error: float, longest: Tensor) -> "Bounds":
        """Widen thresholds by the error of a float32 product.

        Args:
            exact: (R,) float64; -inf where everything counts.
            relative_error: ``narrow_error`` of the width of the features.
            longest: (), largest product of the lengths of two rows.

        Example:
            >>> one = torch.ones((), dtype=torch.float64)
            >>> bounds = Bounds.of(one[None] / 2, 1e-6, one)
            >>> [round(float(side), 5) for side in bounds[1:]]
            [0.5, 0.5]
            >>> bool(bounds.below < 0.5 < bounds.above)
            True
        """
        error = relative_error * longest
        up, down = (exact.new_tensor(end, dtype=torch.float32) for end in (torch.inf, -torch.inf))
        return cls(
            exact,
            torch.nextafter((exact + error).float(), up),
            torch.nextafter((exact - error).float(), down),
        )

    def part(self, rows: slice) -> "Bounds":
        """Thresholds of some rows."""
        return Bounds(*(side[rows] for side in self))


class NarrowCounts(NamedTuple):
    """Similarities of a rectangle at or above the thresholds.

    Attributes:
        of_rows: (R,) int64; zeros where too many were open.
        of_columns: (C,) int64, likewise.
        has_too_many: () bool, whether float64 must decide the whole rectangle.
    """

    of_rows: Tensor
    of_columns: Tensor
    has_too_many: Tensor


def count_narrowly(
    row_features: Tensor,
    column_features: Tensor,
    row_bounds: Bounds,
    column_bounds: Bounds,
    left_out: Tensor | None,
) -> NarrowCounts:
    """Count, for each row and each column, the similarities at or above its threshold.

    Args:
        row_features: (R, D).
        column_features: (C, D).
        row_bounds: of the rows.
        column_bounds: of the columns.
        left_out: (R, C) bool, pairs that do not count; None leaves out none.
    """
    num_rows, num_columns = len(row_features), len(column_features)
    scores = narrow_similarity(row_features, column_features)
    over_row = scores > row_bounds.above[:, None]
    over_column = scores > column_bounds.above
    # What compares with nothing, as inf - inf, is open, too.
    is_open = ~(over_row | (scores < row_bounds.below[:, None]))
    is_open |= ~(over_column | (scores < column_bounds.below))
    if left_out is not None:
        is_open &= ~left_out
    settled = ~is_open if left_out is None else ~(is_open | left_out)
    of_rows = over_row.logical_and_(settled).sum(dim=1)
    of_columns = over_column.logical_and_(settled).sum(dim=0)
    most = _OPEN_PER_ROW * (num_rows + num_columns)
    has_too_many = is_open.sum() > most
    if scores.device.type == "cpu":
        places = is_open.nonzero()[:most]
    else:
        places = is_open.nonzero_static(size=most)
    for part in places.split(max(num_rows, num_columns)):
        rows, columns = part.T
        is_place = rows >= 0  # the list is filled up with -1
        rows, columns = rows.clamp(min=0), columns.clamp(min=0)
        exact = (row_features[rows].double() * column_features[columns].double()).sum(dim=1)
        counts = is_place & (exact >= row_bounds.exact[rows])
        of_rows.index_add_(0, rows, counts.long())
        counts = is_place & (exact >= column_bounds.exact[columns])
        of_columns.index_add_(0, columns, counts.long())
    nothing = torch.zeros((), dtype=torch.int64, device=scores.device)
    return NarrowCounts(
        torch.where(has_too_many, nothing, of_rows),
        torch.where(has_too_many, nothing, of_columns),
        has_too_many,
    )
