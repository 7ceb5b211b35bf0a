"""Ground truth of the lab in plain loops and float64, written from the paper."""

import math

import torch


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def corners_of(k):
    """Corners of a regular simplex, one by one: each has -1/(k-1) with all before it."""
    corners = []
    for number in range(k):
        corner = [0.0] * (k - 1)
        for axis, other in enumerate(corners):
            known = sum(a * b for a, b in zip(corner, other, strict=True))
            corner[axis] = (-1 / (k - 1) - known) / other[axis]
        left = 1 - sum(value**2 for value in corner)
        if number < k - 1:
            corner[number] = math.sqrt(left)
        corners.append(corner)
    return corners


def adapted_rows(features, strength_logit):
    """(delta x, sqrt(1 - delta^2) w_a) for every modality a; features are lists of lists."""
    delta = 1 / (1 + math.exp(-strength_logit))
    rest = math.sqrt(1 - delta**2)
    return [
        [[delta * x for x in row] + [rest * w for w in corner] for row in rows]
        for rows, corner in zip(features, corners_of(len(features)), strict=True)
    ]


def multimodal_loss(features, scale, relative_bias):
    """Mean over every two modalities of the sigmoid loss, a sum over pairs divided by N."""
    losses = []
    for a in range(len(features)):
        for b in range(a + 1, len(features)):
            total = 0.0
            for i, x in enumerate(features[a]):
                for j, y in enumerate(features[b]):
                    cosine = sum(p * q for p, q in zip(x, y, strict=True))
                    sign = 1 if i == j else -1
                    total += softplus(-sign * scale * (cosine - relative_bias))
            losses.append(total / len(features[a]))
    return sum(losses) / len(losses)


def adapted_loss_and_gradients(features, strength_logit, scale, relative_bias):
    """Loss behind an adapter; gradients by central differences, relative error about 1e-9."""

    def loss(values):
        *rows, strength, t, b = values
        return multimodal_loss(adapted_rows(rows, strength), t, b)

    start = [rows.tolist() for rows in features] + [strength_logit, scale, relative_bias]
    gradients = []
    for number, value in enumerate(start):
        if isinstance(value, float):
            gradients.append(_difference(loss, start, number, None))
            continue
        gradients.append(
            torch.tensor(
                [
                    [_difference(loss, start, number, (i, j)) for j in range(len(row))]
                    for i, row in enumerate(value)
                ],
                dtype=torch.float64,
            )
        )
    return loss(start), gradients


def _difference(loss, values, number, place, step=1e-4):
    """Fourth-order central difference by one number."""
    total = 0.0
    for factor, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        moved = list(values)
        if place is None:
            moved[number] += factor * step
        else:
            rows = [list(row) for row in moved[number]]
            rows[place[0]][place[1]] += factor * step
            moved[number] = rows
        total += weight * loss(moved)
    return total / (12 * step)


def margin_and_bias(features):
    """Half gap and its middle, one threshold for every two modalities."""
    lowest, highest = math.inf, -math.inf
    for a in range(len(features)):
        for b in range(a + 1, len(features)):
            for i, x in enumerate(features[a]):
                for j, y in enumerate(features[b]):
                    cosine = sum(p * q for p, q in zip(x, y, strict=True))
                    if i == j:
                        lowest = min(lowest, cosine)
                    else:
                        highest = max(highest, cosine)
    return (lowest - highest) / 2, (lowest + highest) / 2
