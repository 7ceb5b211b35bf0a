"""Cross-entropy over a large vocabulary, in chunks of rows, whose logits are made twice."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_LOGITS = 2**26  # 256 MB as float32


def token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row against its label, and the likeliest label.

        z_n = W h_n + b,    loss_n = log sum_v exp(z_nv) - z_n,label_n

    Products are taken in the precision of autocast, or of ``hidden`` without it; logits, their
    exponentials and the losses in float32 at least. Of the N x V logits one chunk exists at a time,
    in forward and again in backward, beside it at most its copy in a narrower precision.

    Args:
        hidden: (N, C).
        weight: (V, C), W.
        bias: (V,).
        labels: (N,) int64 in [0, V).
        chunk_rows: rows whose logits exist together; None is as many as 256 MB hold in float32.

    Returns:
        (N,) losses in nats; (N,) int64, of equal logits the first.

    Example:
        >>> hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3)
        >>> losses, best = token_losses(hidden, weight, torch.zeros(4), torch.tensor([1, 2]))
        >>> losses, best
        (tensor([1.3863, 1.3863]), tensor([0, 0]))
    """
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows = chunk_rows or max(1, _CHUNK_LOGITS // len(weight))
    with torch.autocast(device, enabled=False):
        losses, best = _TokenLosses.apply(hidden, weight, bias, labels, dtype, rows)
    return losses, best


class _TokenLosses(torch.autograd.Function):
    """Keeps of the logits their log-sum-exp alone."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        matrix, found = weight.to(dtype), []
        for rows, own in zip(hidden.split(chunk_rows), labels.split(chunk_rows), strict=True):
            logits = _logits(rows.to(dtype), matrix, bias)
            best, at_label = logits.argmax(dim=1), logits.gather(1, own[:, None]).squeeze(1)
            top, sums = exponentials_(logits)
            spread = sums.log_().add_(top).squeeze(1)
            found.append((spread, spread - at_label, best))
            del logits  # before the next ones are made
        spread, losses, best = (torch.cat(column) for column in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, labels, spread)
        ctx.dtype, ctx.chunk_rows = dtype, chunk_rows
        ctx.mark_non_differentiable(best)
        return losses, best

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, spread = ctx.saved_tensors
        dtype: torch.dtype = ctx.dtype
        matrix = weight.to(dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=wide)
        of_bias = torch.zeros_like(bias, dtype=wide)
        for first in range(0, len(hidden), ctx.chunk_rows):
            part = slice(first, first + ctx.chunk_rows)
            rows, own = hidden[part].to(dtype), labels[part, None]
            slope = _logits(rows, matrix, bias).sub_(spread[part, None]).exp_()
            slope.scatter_add_(1, own, slope.new_full(own.shape, -1.0))
            slope.mul_(gradients[0][part, None])
            of_bias += slope.sum(dim=0)
            narrow = slope.to(dtype)
            of_hidden[part] = narrow @ matrix
            if dtype == wide:
                of_weight.addmm_(narrow.T, rows)
            else:
                of_weight += narrow.T @ rows
            del slope, narrow
        return of_hidden, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None, None, None


def exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Put exp(z - max z) in the place of logits z, row by row, so that no second copy is made.

    Returns:
        (..., 1) max z, and (..., 1) the sum of what now stands there.
    """
    top = logits.amax(dim=-1, keepdim=True)
    return top, logits.sub_(top).exp_().sum(dim=-1, keepdim=True)


def _logits(rows: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """(rows, V), at least float32."""
    logits = F.linear(rows, matrix)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.add_(bias)
