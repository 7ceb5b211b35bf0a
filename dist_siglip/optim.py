"""How the parameters move: AdamW, which of them decay, and the learning rate of each step.

The defaults are those of SigLIP (Zhai et al. 2023, arXiv:2303.15343): beta2 = 0.95, since 0.999
let the gradient norm spike at large batches (their Figure 5), and no decay on scale, bias and
norms. Gradient clipping is the Trainer's (``gradient_clip_val``).
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from dist_siglip.errors import UserError

logger = logging.getLogger(__name__)

Schedule = Literal["cosine", "linear", "constant"]

# Names that mark parameters without decay whatever their shape; ln and bn only as whole words.
_UNDECAYED_NAME = re.compile(r"(^|[._])(ln|bn)([._]|$)|bias|logit_scale|log_scale")
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of AdamW and of its learning rate.

    Args:
        learning_rate: highest learning rate, reached at the end of the warm-up; > 0.
        beta1: decay of the running mean of gradients, in [0, 1).
        beta2: decay of the running mean of squared gradients, in [0, 1).
        epsilon: added to the root of that mean; > 0.
        weight_decay: every step multiplies decayed weights by 1 - (learning rate of the step) *
            weight_decay; >= 0. The SigLIP paper's 1e-4 does not count the learning rate, so its
            recipe (learning rate 1e-3) is 0.1 here.
        warmup_steps: optimizer steps of linear growth at the start; 0 turns it off.
        schedule: what follows the warm-up: down along half a cosine, down a line, or constant.
        min_learning_rate_fraction: where cosine and line end, as a share of learning_rate, in
            [0, 1].

    Raises:
        UserError: If a value is out of range.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    min_learning_rate_fraction: float = 0.0

    def __post_init__(self) -> None:
        fraction = self.min_learning_rate_fraction
        _require("learning_rate", self.learning_rate, self.learning_rate > 0, "> 0, e.g. 1e-3")
        _require("beta1", self.beta1, 0 <= self.beta1 < 1, "in [0, 1), e.g. 0.9")
        _require("beta2", self.beta2, 0 <= self.beta2 < 1, "in [0, 1), e.g. 0.95")
        _require("epsilon", self.epsilon, self.epsilon > 0, "> 0, e.g. 1e-8")
        _require("weight_decay", self.weight_decay, self.weight_decay >= 0, ">= 0; 0 turns it off")
        _require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, ">= 0; 0 turns it off")
        _require("min_learning_rate_fraction", fraction, 0 <= fraction <= 1, "in [0, 1]")
        schedules = get_args(Schedule)
        allowed = f"one of {', '.join(schedules)}"
        _require("schedule", self.schedule, self.schedule in schedules, allowed)


def _require(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{name} ({value}) must be {allowed}")


def learning_rate_factor(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    schedule: Schedule = "cosine",
    min_fraction: float = 0.0,
) -> float:
    """Share of the highest learning rate that a step uses.

    With w warm-up steps, T steps in all, m = min_fraction and p = (step - w) / (T - w), kept in
    [0, 1]:

        step < w:  (step + 1) / w
        cosine:    m + (1 - m) * (1 + cos(pi * p)) / 2
        linear:    m + (1 - m) * (1 - p)
        constant:  1

    Args:
        step: number of optimizer steps already taken, from 0.
        warmup_steps: w; if it is T or more, the run ends inside the warm-up.
        total_steps: T; from step T on the value stays at its end.
        schedule: one of "cosine", "linear", "constant".
        min_fraction: m, in [0, 1].

    Returns:
        A number in [0, 1].

    Example:
        >>> steps = (0, 1, 2, 6, 10, 11)
        >>> [round(learning_rate_factor(s, warmup_steps=2, total_steps=10), 3) for s in steps]
        [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]

    Source:
        Warm-up and cosine as in open_clip's ``scheduler.py`` (``cosine_lr``), for m = 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return min_fraction + (1 - min_fraction) * remaining


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


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of a module by whether they decay.

    Parameters that do not require a gradient are left out; a shared one is listed once. The order
    is that of ``module.named_parameters()``, the same on every rank and at every resume.

    Args:
        module: everything that is trained, scale and bias included.
        weight_decay: of the group that decays.

    Returns:
        At most two groups for ``torch.optim``, each with "name", "params" and "weight_decay"; a
        group without parameters is left out.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trainable if decays(name, p)]
    undecayed = [p for name, p in trainable if not decays(name, p)]
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": decayed, "weight_decay": weight_decay},
        {"name": "no_decay", "params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, config: OptimConfig, total_steps: int
) -> tuple[AdamW, LambdaLR]:
    """Build AdamW and its schedule, which is to be stepped once per optimizer step.

    AdamW is fused where torch has a fused kernel for all parameters (floating point, on CPU or
    CUDA). Build it after the module has been moved to its device.

    Args:
        module: everything that is trained, scale and bias included.
        config: settings.
        total_steps: optimizer steps of the whole run, not of what is left of it; > 0.

    Raises:
        UserError: If nothing is trainable or total_steps is not positive.
        RuntimeError: If a trainable parameter is in no group or in two.
    """
    _require("total_steps", total_steps, total_steps > 0, "> 0; set max_steps of the trainer")
    if config.schedule != "constant" and config.warmup_steps >= total_steps:
        logger.warning(
            "warmup_steps (%d) leaves none of the %d steps for the %s schedule",
            config.warmup_steps,
            total_steps,
            config.schedule,
        )
    groups = parameter_groups(module, config.weight_decay)
    if not groups:
        raise UserError("no parameter is trainable; unfreeze a tower, the scale or the bias")
    check_coverage(module, groups)
    optimizer = AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=can_fuse(module),
    )
    factor = partial(
        learning_rate_factor,
        warmup_steps=config.warmup_steps,
        total_steps=total_steps,
        schedule=config.schedule,
        min_fraction=config.min_learning_rate_fraction,
    )
    return optimizer, LambdaLR(optimizer, factor)


def can_fuse(module: nn.Module) -> bool:
    """Whether fused AdamW can move every trainable parameter of a module."""
    return all(
        parameter.device.type in _FUSED_DEVICES and parameter.is_floating_point()
        for parameter in module.parameters()
        if parameter.requires_grad
    )


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
