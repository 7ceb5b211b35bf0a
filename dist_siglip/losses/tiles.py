"""Pure formulas on one rectangle (tile) of the logit matrix; no ranks, no autograd.

A sigmoid tile needs nothing from any other tile: its value and its derivative with respect to
every logit depend on one pair each. So one visit gives the loss of the tile and all gradients.

Numbers: the product of features runs in their dtype; logits, values and derivatives are float32
(float64 for float64 features). ``softplus`` is exact; a positive's value is softplus(-z), never
softplus(z) - z, which cancels for large z, and its derivative is -sigmoid(-z), never
sigmoid(z) - 1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SigmoidTile(NamedTuple):
    """What one tile says.

    Attributes:
        value: (), sum over the pairs of the tile of softplus(-y * logit).
        derivative: (rows, columns), d value / d logit; None if not asked for.
        similarity: (rows, columns), products of the features.
    """

    value: Tensor
    derivative: Tensor | None
    similarity: Tensor


def logits_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype of logits and accumulators for these features."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def sigmoid_tile(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    on_diagonal: bool,
    with_derivative: bool,
) -> SigmoidTile:
    """Sum the sigmoid loss over the pairs of one tile.

    With y[i, j] = +1 if the tile lies on the diagonal and i == j, else -1:

        value = sum_ij softplus(-y[i, j] * logits[i, j])
        logits = logit_scale * image_features @ text_features.T + logit_bias

    Args:
        image_features: (rows, D).
        text_features: (columns, D).
        logit_scale: () in the logits' dtype, the multiplier.
        logit_bias: () in the logits' dtype, added.
        on_diagonal: whether pair (i, i) of this tile is a positive.
        with_derivative: whether the derivative is wanted.

    Returns:
        A ``SigmoidTile``; sums, not means.

    Example:
        >>> one = torch.ones(1, 1)
        >>> tile = sigmoid_tile(one, one, torch.tensor(2.0), torch.tensor(-2.0),
        ...                     on_diagonal=True, with_derivative=True)
        >>> tile.value, tile.derivative
        (tensor(0.6931), tensor([[-0.5000]]))

    Source:
        Zhai et al. 2023, arXiv:2303.15343, Algorithm 1 (the bias is added).
    """
    dtype = logits_dtype(image_features)
    similarity = (image_features @ text_features.T).to(dtype)
    logits = torch.addcmul(logit_bias, similarity, logit_scale)
    values = F.softplus(logits)
    positives = logits.diagonal().clone() if on_diagonal else None
    if positives is not None:
        values.diagonal().copy_(F.softplus(-positives))
    derivative = None
    if with_derivative:
        derivative = logits.sigmoid_()
        if positives is not None:
            derivative.diagonal().copy_(-torch.sigmoid(-positives))
    return SigmoidTile(values.sum(), derivative, similarity)
