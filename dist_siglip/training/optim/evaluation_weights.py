"""Weights of optimizers that evaluate with others than they train with, such as schedule-free ones.

Such an optimizer has ``train()`` and ``eval()``, which turn the parameters into the point where
gradients are taken, and into the average that is the result. Going there and back would round the
weights, and a run would depend on how often it is evaluated: so the weights of training are kept
aside and put back bit for bit.

A checkpoint holds the average as ``state_dict`` and the weights of training as
``current_model_state``, as Lightning's averaging does.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

UNAVERAGED = "current_model_state"
_MARK = "optimizer_averages"


def averaging_parts(optimizers: Iterable[Optimizer]) -> list[Any]:
    """List optimizers that have ``train()`` and ``eval()``, those inside of pairs included.

    Example:
        >>> averaging_parts([torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)])
        []
    """
    parts = [part for each in optimizers for part in getattr(each, "parts", (each,))]
    return [
        part
        for part in parts
        if callable(getattr(part, "train", None)) and callable(getattr(part, "eval", None))
    ]


class EvaluationWeights:
    """Turns weights of training into those to evaluate and back; for most optimizers nothing.

    Example:
        >>> weights = EvaluationWeights()
        >>> weights.enter([])
        >>> weights.leave([])
    """

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Parameter, Tensor]] | None = None

    @torch.no_grad()
    def enter(self, optimizers: Iterable[Optimizer]) -> None:
        """Keep the weights of training aside and let the optimizers put theirs in place."""
        parts = averaging_parts(optimizers)
        if not parts or self._kept is not None:
            return
        self._kept = [
            (parameter, parameter.detach().clone())
            for part in parts
            for group in part.param_groups
            for parameter in group["params"]
        ]
        for part in parts:
            part.eval()

    @torch.no_grad()
    def leave(self, optimizers: Iterable[Optimizer]) -> None:
        """Put the weights of training back as they were."""
        if self._kept is None:
            return
        for part in averaging_parts(optimizers):
            part.train()
        for parameter, value in self._kept:
            parameter.copy_(value)
        self._kept = None

    def write(
        self, checkpoint: dict[str, Any], module: nn.Module, optimizers: list[Optimizer]
    ) -> None:
        """Put the average and the weights of training into a checkpoint, in training or not."""
        if not averaging_parts(optimizers) or "optimizer_states" not in checkpoint:
            return
        was_entered = self._kept is not None
        self.leave(optimizers)
        checkpoint["optimizer_states"] = [each.state_dict() for each in optimizers]
        checkpoint[UNAVERAGED] = _copied(module) if was_entered else module.state_dict()
        self.enter(optimizers)
        checkpoint["state_dict"] = _copied(module)
        checkpoint[_MARK] = True
        if not was_entered:
            self.leave(optimizers)


def take_training_weights(checkpoint: dict[str, Any]) -> None:
    """Let training go on from the weights beside the average, where a checkpoint has them.

    Example:
        >>> take_training_weights({"state_dict": {}})
    """
    if _MARK in checkpoint:
        checkpoint["state_dict"] = checkpoint[UNAVERAGED]


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
