"""What a module takes from a checkpoint of another run that it goes on from.

A second ``fit`` may have objectives that the first did not have, or pictures of another size. It
takes weights and states of the optimizer by their names. Towers and logits must be those of the
checkpoint, but for positions and kernel of patches, which are resampled for another grid, and for
the form of the image tower: of pictures of one size, or of any shape (NaFlex). What else the
checkpoint lacks stays as it was built, and what it has beyond that is left out.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from dist_siglip.errors import UserError
from dist_siglip.models.naflex import to_form_of
from dist_siglip.models.weights import (
    NETWORK_PREFIX,
    OF_THE_GRID,
    SHOWN_KEYS,
    TOWERS_PREFIX,
    is_of_another_grid,
    resample_for_grid,
)

_SAME = (TOWERS_PREFIX, "logits.")
_NETWORK = TOWERS_PREFIX + NETWORK_PREFIX
# Of a group of the optimizer: what the settings say now. Anything else goes on.
_OF_THE_SETTINGS = frozenset({"params", "name", "weight_decay", "betas", "eps"})


class Differences(NamedTuple):
    """Names of parameters and buffers.

    Attributes:
        fresh: that a checkpoint lacks.
        left_out: that it has and the module does not.
        resampled: positions of patches on a grid of another size, and kernels of other patches.
        converted: that it has in the other form of image tower, under other names.
    """

    fresh: tuple[str, ...]
    left_out: tuple[str, ...]
    resampled: tuple[str, ...]
    converted: tuple[str, ...] = ()

    def describe(self) -> str:
        """Say what is not as in the checkpoint, by groups of names; empty if all is.

        Example:
            >>> heads = ("objectives.captioning.a", "objectives.captioning.b")
            >>> Differences(heads, (), ("towers.clip.visual.positional_embedding",)).describe()
            'fresh: objectives.captioning (2); resampled: towers.clip (1)'
        """
        parts = []
        titles = ("fresh", "left out", "resampled", "of the other form of image tower")
        for title, names in zip(titles, self, strict=True):
            groups: dict[str, int] = {}
            for name in names:
                group = ".".join(name.split(".")[:2])
                groups[group] = groups.get(group, 0) + 1
            if groups:
                listed = ", ".join(f"{group} ({number})" for group, number in groups.items())
                parts.append(f"{title}: {listed}")
        return "; ".join(parts)


def compare(module: Any, stored: Mapping[str, Size], path: Path) -> Differences:
    """Compare a module with the weights of a checkpoint of another run, by name and shape.

    Args:
        module: as it will train.
        stored: shapes in the checkpoint.
        path: of the checkpoint, for the error.

    Raises:
        UserError: if towers, logits or the heads of an objective that both have are others.
    """
    own = {name: value.shape for name, value in module.state_dict().items()}
    new_names = _new_names(module, stored)
    stored = {name: value.shape for name, value in _in_form_of(module, _empty(stored)).items()}
    fresh = tuple(name for name in own if name not in stored)
    left_out = tuple(name for name in stored if name not in own)
    reshaped = [name for name in own if name in stored and own[name] != stored[name]]
    resampled = tuple(
        name
        for name in reshaped
        if name.endswith(OF_THE_GRID)
        and is_of_another_grid(module.towers.clip, _bare(name), stored[name], own[name])
    )
    whole = (*_SAME, *(_objectives_of(own) & _objectives_of(stored)))
    problems = [f"missing {name}" for name in fresh if name.startswith(whole)]
    problems += [f"unexpected {name}" for name in left_out if name.startswith(whole)]
    problems += [
        f"{name} is {tuple(stored[name])} instead of {tuple(own[name])}"
        for name in reshaped
        if name not in resampled
    ]
    if problems:
        number = len(problems) - SHOWN_KEYS
        more = f" and {number} more" if number > 0 else ""
        raise UserError(
            f"from_run ({path}) is of another architecture: {'; '.join(problems[:SHOWN_KEYS])}"
            f"{more}; build the model and the heads of that run, or leave heads out"
        )
    return Differences(fresh, left_out, resampled, tuple(new_names.values()))


def _empty(shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _in_form_of(module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of the network the names and shapes of the form of image tower of a module."""
    inside = {name: value for name, value in tensors.items() if name.startswith(_NETWORK)}
    bare = {name.removeprefix(_NETWORK): value for name, value in inside.items()}
    changed = {_NETWORK + k: v for k, v in to_form_of(module.towers.clip, bare).items()}
    return {name: v for name, v in tensors.items() if name not in inside} | changed


def _new_names(module: Any, stored: Mapping[str, Size]) -> dict[str, str]:
    """Names of what a checkpoint has in the other form of image tower, and those of a module."""
    changed = {
        name: next(iter(_in_form_of(module, {name: value})))
        for name, value in _empty(stored).items()
        if name.startswith(_NETWORK)
    }
    return {name: new for name, new in changed.items() if name != new}


def convert_optimizer(
    module: Any, saved: Mapping[str, Any], stored: Mapping[str, Size]
) -> dict[str, Any]:
    """Return the state of an optimizer for the form of image tower of a module.

    The kernel of a convolution and the matrix of its patches hold the same numbers in another
    order, as positions in a row and in a grid do, so moments, a number for each weight, take that
    order, too. A state of anything else begins anew.

    Args:
        module: under training.
        saved: "state" and "param_groups" of the checkpoint, by names of parameters.
        stored: shapes of its weights.
    """
    new_names = _new_names(module, stored)
    states = {name: state for name, state in saved["state"].items() if name not in new_names}
    for name, new in new_names.items():
        state = saved["state"].get(name, {})
        sizes = {torch.as_tensor(value).shape for value in state.values()}
        if state and sizes <= {Size(), stored[name]}:
            states[new] = {
                key: _in_form_of(module, {name: value})[new]
                if torch.as_tensor(value).ndim
                else value
                for key, value in state.items()
            }
    return {**saved, "state": states}


def _objectives_of(names: Iterable[str]) -> set[str]:
    """Beginnings of the names of heads, one of each objective."""
    parts = (name.split(".") for name in names if name.startswith("objectives."))
    return {f"objectives.{part[1]}." for part in parts}


def _bare(name: str) -> str:
    """Name in the network of what the tower, or a copy of it, has."""
    return next(each for each in OF_THE_GRID if name.endswith(each))


def adopt_weights(
    module: Any, state: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], Differences]:
    """Return what a checkpoint has of a module's state, resampled where the grid is another.

    Args:
        module: with ``towers``; sharded or not.
        state: whole tensors by name.
        path: of the checkpoint.

    Raises:
        UserError: as ``compare``.
    """
    found = compare(module, {name: value.shape for name, value in state.items()}, path)
    state = _in_form_of(module, state)
    own = module.state_dict()
    adopted = {name: value for name, value in state.items() if name in own}
    if found.resampled:
        adopted |= resample(module, {name: state[name] for name in found.resampled}, path)
    return adopted, found


def resample(module: Any, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Bring what ``compare`` calls resampled, of the tower or a copy of it, to a module's grid."""
    return {
        name: resample_for_grid(module.towers.clip, _bare(name), value, path)
        for name, value in tensors.items()
    }


def adopt_optimizer(
    saved: Mapping[str, Any], current: Mapping[str, Any], resampled: Collection[str] = ()
) -> dict[str, Any]:
    """Return the state of an optimizer with what another has of it, both by names of parameters.

    Groups are the present ones, with their decay and betas; what else a group of the same name had,
    such as a count of steps, goes on. A parameter without a state begins with one of its own.

    Args:
        saved: "state" and "param_groups" of the checkpoint.
        current: those of the optimizer there is.
        resampled: parameters whose state is of another shape, and begins anew.

    Example:
        >>> saved = {"state": {"a": 1, "b": 2}, "param_groups": [{"name": "decay", "k": 7}]}
        >>> current = {"param_groups": [{"name": "decay", "params": ["c", "a"], "k": 0}]}
        >>> adopt_optimizer(saved, current)
        {'state': {'a': 1}, 'param_groups': [{'name': 'decay', 'params': ['c', 'a'], 'k': 7}]}
    """
    before = {group.get("name"): group for group in saved["param_groups"]}
    groups = [
        group
        | {
            key: value
            for key, value in before.get(group.get("name"), {}).items()
            if key not in _OF_THE_SETTINGS
        }
        for group in current["param_groups"]
    ]
    names = {name for group in groups for name in group["params"]} - set(resampled)
    return {
        "state": {name: state for name, state in saved["state"].items() if name in names},
        "param_groups": groups,
    }
