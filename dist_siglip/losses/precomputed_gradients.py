"""Entry of a loss into autograd whose gradients were computed in forward.

A pass around the ranks gives the loss and all its gradients in forward. Here they are kept
unscaled, in float32 or float64, and multiplied by the incoming gradient in backward before they
are cast: so a fp16 GradScaler reaches them in time, backward communicates nothing, and a second
backward (retain_graph) finds them unchanged.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_siglip.losses.arguments import refuse_second_order


class PrecomputedGradient(NamedTuple):
    """The gradient of a value with respect to one tensor is factor * unscaled.

    Attributes:
        tensor: what the value depends on.
        unscaled: shape of ``tensor``; None if its gradient was not wanted.
        factor: one number.
    """

    tensor: Tensor
    unscaled: Tensor | None
    factor: Tensor | float = 1.0


def wants_gradient(tensor: Tensor) -> bool:
    """Whether a backward pass can ask for the gradient of ``tensor``."""
    return torch.is_grad_enabled() and tensor.requires_grad


def attach_gradients(name: str, value: Tensor, gradients: Sequence[PrecomputedGradient]) -> Tensor:
    """Return ``value`` as a function of the tensors whose gradients are given.

    Args:
        name: of the loss, for the error under create_graph=True.
        value: (), without a graph.
        gradients: one entry per tensor.

    Returns:
        (), equal to ``value``.

    Raises:
        RuntimeError: in backward, if second-order gradients are asked for.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> by_x = PrecomputedGradient(x, 2 * x.detach())
        >>> y = attach_gradients("square", x.detach() ** 2, [by_x])
        >>> y.backward()
        >>> x.grad
        tensor(6.)
    """
    tensors = [entry.tensor for entry in gradients]
    unscaled = [entry.unscaled for entry in gradients]
    factors = [entry.factor for entry in gradients]
    return _Attach.apply(name, value, unscaled, factors, *tensors)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        value: Tensor,
        unscaled: list[Tensor | None],
        factors: list[Tensor | float],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.name, ctx.factors = name, factors
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(*unscaled)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(ctx.name)
        scaled = [
            None if gradient is None else _scale(gradient, incoming * factor, dtype)
            for gradient, factor, dtype in zip(
                ctx.saved_tensors, ctx.factors, ctx.dtypes, strict=True
            )
        ]
        return (None, None, None, None, *scaled)


def _scale(gradient: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * weight, multiplied before the cast and out of place."""
    if gradient.ndim == 0 or gradient.dtype == dtype:
        return (gradient * weight).to(dtype)
    result = torch.empty_like(gradient, dtype=dtype)
    # In pieces: all rows at once would need the gradient's memory a second time.
    step = 256 if gradient.device.type == "cpu" else 4096
    for start in range(0, gradient.shape[0], step):
        rows = slice(start, start + step)
        result[rows].copy_(gradient[rows] * weight)
    return result
