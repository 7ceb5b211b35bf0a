"""Losses at prefixes of the dimension: cut, of length 1 again, taken back; loops in float64."""

import math
from functools import lru_cache

import torch

from tests.support.parity import WIDTH, make_rows
from tests.support.reference import sigmoid_loss_and_gradients
from tests.support.reference_pairwise import softmax_loss_and_gradients

DIMS, WEIGHTS = (2, 5, 3), (1.0, 3.0, 0.5)
# One each, in the order of the dims; the losses take them from the largest prefix on.
SCALES, BIASES = {5: 7.0, 3: 5.0, 2: 4.0}, {5: -3.0, 3: -2.0, 2: 1.0}


def unit_prefix(rows, dim):
    """Rows of length 1 from the first columns, and the lengths before."""
    lengths = [math.sqrt(sum(float(x) ** 2 for x in row[:dim])) for row in rows]
    return [
        [float(x) / n for x in row[:dim]] for row, n in zip(rows, lengths, strict=True)
    ], lengths


def taken_back(gradient, unit, lengths):
    """Through u / |u|: (g - <g, u> u) / |u|, row by row."""
    found = torch.zeros(len(unit), WIDTH, dtype=torch.float64)
    for i, (row, length) in enumerate(zip(unit, lengths, strict=True)):
        radial = sum(float(gradient[i][k]) * row[k] for k in range(len(row)))
        for k, value in enumerate(row):
            found[i, k] = (float(gradient[i][k]) - radial * value) / length
    return found


@lru_cache
def reference_of(kind, num_rows):
    rows = make_rows(("image", "text"), num_rows)
    total = {
        "loss": torch.zeros((), dtype=torch.float64),
        "image": torch.zeros(num_rows, WIDTH, dtype=torch.float64),
        "text": torch.zeros(num_rows, WIDTH, dtype=torch.float64),
        "scale": torch.zeros(len(DIMS), dtype=torch.float64),
        "bias": torch.zeros(len(DIMS), dtype=torch.float64),
    }
    for number, dim in enumerate(sorted(DIMS, reverse=True)):
        share = WEIGHTS[DIMS.index(dim)] / sum(WEIGHTS)
        cut = {name: unit_prefix(side, dim) for name, side in rows.items()}
        sides = [torch.tensor(unit, dtype=torch.float64) for unit, _ in cut.values()]
        if kind == "softmax":
            found = softmax_loss_and_gradients(*sides, SCALES[dim]) | {"bias": 0.0}
        else:
            found = sigmoid_loss_and_gradients(*sides, SCALES[dim], BIASES[dim])
        total["loss"] += share * found["loss"]
        for name in ("scale", "bias"):
            total[name][number] += share * found[name]
        for name in rows:
            whole = dim == WIDTH  # as they are: nothing to take back
            back = found[name] if whole else taken_back(found[name], *cut[name])
            total[name] += share * back
    return total
