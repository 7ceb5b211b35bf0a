"""Optimizer state keyed by parameter name instead of number.

Sharded runs know names only, so a run with or without shards can go on from the other's checkpoint.
``torch.optim`` itself numbers parameters group by group.
"""

from typing import Any

from torch import nn
from torch.optim import Optimizer


def by_name(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Rename the numbers of ``optimizer.state_dict()`` to names of parameters.

    Args:
        state: with numbers or, then returned as it is, with names.
        optimizer: whose state it is.
        module: that has the parameters.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> by_name(optimizer.state_dict(), optimizer, layer)["param_groups"][0]["params"]
        ['weight', 'bias']
    """
    if not _has_numbers(state):
        return state
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return _rename(state, dict(enumerate(ordered)))


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    """Number the names of a state again, group by group, as ``torch.optim`` expects.

    Example:
        >>> by_number({"state": {"b": 1}, "param_groups": [{"params": ["a", "b"]}]})
        {'state': {1: 1}, 'param_groups': [{'params': [0, 1]}]}
    """
    if _has_numbers(state):
        return state
    ordered = [name for group in state["param_groups"] for name in group["params"]]
    return _rename(state, {name: number for number, name in enumerate(ordered)})


def _has_numbers(state: dict[str, Any]) -> bool:
    return any(isinstance(key, int) for group in state["param_groups"] for key in group["params"])


def _rename(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    return {
        **state,
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[key] for key in group["params"]]}
            for group in state["param_groups"]
        ],
    }
