"""Parameter groups by learning rate and weight decay."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

# Names that mark parameters without decay whatever their shape; ln and bn only as whole words.
_UNDECAYED_NAME = re.compile(r"(^|[._])(ln|bn)([._]|$)|bias|logit_scale|log_scale")


class ParameterRule(NamedTuple):
    """How a parameter departs from the rest.

    Attributes:
        learning_rate_factor: multiplies the learning rate of every step.
        weight_decay: of this parameter, if it decays at all; None is that of the optimizer.
    """

    learning_rate_factor: float = 1.0
    weight_decay: float | None = None


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies to a parameter.

    It does not apply to vectors and scalars (norms, biases, class tokens of open_clip's own ViT),
    to parameters of a single element (scale and bias), and to any whose name speaks of a bias,
    a logit scale, or a norm called ``ln`` or ``bn``. Matrices and tables decay, those of token
    and position embeddings included.

    Example:
        >>> matrix, vector = torch.ones(4, 4), torch.ones(4)
        >>> decays("visual.proj", matrix), decays("positional_embedding", matrix)
        (True, True)
        >>> decays("ln_final.weight", vector), decays("scale.log_scale", torch.ones(1, 1))
        (False, False)

    Source:
        open_clip's training script: ``p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or
        "logit_scale" in n`` is exempt. big_vision also exempts position and token embeddings.
    """
    return parameter.ndim >= 2 and parameter.numel() > 1 and not _UNDECAYED_NAME.search(name)


def parameter_groups(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    rules: Mapping[str, ParameterRule] | None = None,
    chosen: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a module by learning rate and weight decay.

    Parameters that do not require a gradient are left out; a shared one is listed once. Groups
    come in the order of their first parameter in ``module.named_parameters()``, those that decay
    first: the same on every rank and at every resume.

    Args:
        module: everything that is trained, scale and bias included.
        learning_rate: highest, of parameters without a rule.
        weight_decay: of parameters that decay and have no rule.
        rules: exceptions by parameter name.
        chosen: by name and parameter, which are taken; None takes all that are trainable.

    Returns:
        Groups for ``torch.optim``, each with "name", "params", "lr" and "weight_decay". Without
        rules there are at most two, "decay" and "no_decay".
    """
    rules = rules or {}
    plain = ParameterRule()
    found: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or not (chosen is None or chosen(name, parameter)):
            continue
        rule = rules.get(name, plain)
        decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        decayed = decays(name, parameter)
        key = (decayed, rule.learning_rate_factor, decay if decayed else 0.0)
        found.setdefault(key, []).append(parameter)
    return [
        {
            "name": _name(*key, weight_decay),
            "params": found[key],
            "lr": learning_rate * key[1],
            "weight_decay": key[2],
        }
        for key in sorted(found, key=lambda key: not key[0])
    ]


def check_coverage(module: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Check that the groups hold every trainable parameter exactly once.

    Raises:
        RuntimeError: If one is missing, listed twice, or foreign to the module.
    """
    names: Mapping[int, str] = {
        id(p): name for name, p in module.named_parameters() if p.requires_grad
    }
    listed = [id(p) for group in groups for p in group["params"]]
    missing = [name for key, name in names.items() if key not in set(listed)]
    if missing or len(set(listed)) != len(listed) or len(listed) != len(names):
        raise RuntimeError(
            f"parameter groups list {len(listed)} parameters ({len(set(listed))} different) for "
            f"{len(names)} trainable ones; missing: {', '.join(missing) or 'none'}"
        )


def _name(decayed: bool, factor: float, decay: float, plain_decay: float) -> str:
    """Name a group by what sets it apart, such as ``decay, learning rate x 0.1``."""
    parts = ["decay" if decayed else "no_decay"]
    if decayed and decay != plain_decay:
        parts[0] = f"decay {decay:g}"
    if factor != 1:
        parts.append(f"learning rate x {factor:g}")
    return ", ".join(parts)
