"""Formulas of the softmax loss on one rectangle (tile) of logits; no ranks, no autograd.

A softmax needs the sum over a whole row (and column), so it takes two visits: the first adds up
the negatives, the second knows the sums and gives derivatives. The positive is kept out of the
sums, because against its negatives a softmax is a sigmoid: with n the log-sum-exp of the negatives
of a row and z the logit of its positive,

    -log softmax = softplus(n - z)        its derivative by z = -sigmoid(n - z)

which keeps its digits when the positive has nearly all the probability, where logsumexp - z and
probability - 1 would cancel.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.losses.kernels.tiles import similarity


class NegativeSums(NamedTuple):
    """Sums of a tile in the first pass.

    Attributes:
        rows: (rows,), log-sum-exp over the negatives of each row; -inf without any.
        columns: (columns,), the same for each column.
        positives: logits of the positives in the order of their rows; None if there are none.
    """

    rows: Tensor
    columns: Tensor
    positives: Tensor | None


class SoftmaxTile(NamedTuple):
    """Derivative of a tile in the second pass.

    Attributes:
        derivative: (rows, columns), d (sum of both directions' losses) / d logit.
        similarity: (rows, columns), products of the features.
    """

    derivative: Tensor
    similarity: Tensor


def negative_sums_tile(
    row_features: Tensor, column_features: Tensor, logit_scale: Tensor, *, diagonal: int | None
) -> NegativeSums:
    """Add up the negatives of one tile, stably: log sum exp(logits).

    Args:
        row_features: (rows, D).
        column_features: (columns, D).
        logit_scale: () in the logits' dtype, the multiplier.
        diagonal: pairs (i, i + diagonal) are positives; None for none.

    Example:
        >>> one = torch.ones(2, 1)
        >>> negative_sums_tile(one, one, torch.tensor(3.0), diagonal=0)
        NegativeSums(rows=tensor([3., 3.]), columns=tensor([3., 3.]), positives=tensor([3., 3.]))
    """
    logits, _ = _logits(row_features, column_features, logit_scale)
    positives = None
    if diagonal is not None:
        positives = logits.diagonal(diagonal).clone()
        logits.diagonal(diagonal).fill_(-torch.inf)
    return NegativeSums(logits.logsumexp(dim=1), logits.logsumexp(dim=0), positives)


def softmax_tile(
    row_features: Tensor,
    column_features: Tensor,
    logit_scale: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    positive_derivative: Tensor | None,
    diagonal: int | None,
) -> SoftmaxTile:
    """Derive the sum of both directions' losses by every logit of one tile.

        derivative = exp(logits - row_sums) + exp(logits - column_sums)    of a negative

    Args:
        row_features: (rows, D).
        column_features: (columns, D).
        logit_scale: () in the logits' dtype, the multiplier.
        row_sums: (rows,), log-sum-exp over the whole row, positive included.
        column_sums: (columns,), the same over columns.
        positive_derivative: the derivative by the logits of the positives, one each.
        diagonal: pairs (i, i + diagonal) are positives; None for none.

    Example:
        >>> one, zero = torch.ones(1, 1), torch.zeros(1)
        >>> softmax_tile(one, one, torch.tensor(0.0), zero, zero, None, None).derivative
        tensor([[2.]])
    """
    logits, products = _logits(row_features, column_features, logit_scale)
    derivative = (logits - row_sums[:, None]).exp_()
    derivative += logits.sub_(column_sums).exp_()
    if diagonal is not None and positive_derivative is not None:
        derivative.diagonal(diagonal).copy_(positive_derivative)
    return SoftmaxTile(derivative, products)


def _logits(
    row_features: Tensor, column_features: Tensor, logit_scale: Tensor
) -> tuple[Tensor, Tensor]:
    products = similarity(row_features, column_features)
    return products * logit_scale, products
