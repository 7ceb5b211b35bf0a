"""Optimizer and learning-rate schedule from settings.

The defaults are those of SigLIP (Zhai et al. 2023, arXiv:2303.15343): AdamW with beta2 = 0.95,
since 0.999 let the gradient norm spike at large batches (their Figure 5), and no decay on scale,
bias and norms. Gradient clipping is the Trainer's (``gradient_clip_val``).

Muon orthogonalises the update of a matrix, which makes sense inside a network alone: embeddings,
heads, norms, biases and the scale of the logits get another optimizer. A trainer knows one
optimizer with groups, so the two are a pair that shares groups and state.

A schedule that comes down to the end of the run is bound to its length: with another one, the rate
of the step where the run goes on is another, too.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import LBFGS, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dist_siglip.errors import UserError
from dist_siglip.training.optim.groups import (
    ParameterRule,
    check_coverage,
    decays,
    parameter_groups,
)

logger = logging.getLogger(__name__)

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    schedule: Schedule = "cosine",
    min_fraction: float = 0.0,
    cooldown_steps: int = 0,
) -> float:
    """Share of the highest learning rate that a step uses.

    With w warm-up steps, c cool-down steps, T steps in all, m = min_fraction,
    p = (step - w) / (T - w) and q = (step - (T - c)) / c, kept in [0, 1]:

        step < w:  (step + 1) / w
        cosine:    m + (1 - m) * (1 + cos(pi * p)) / 2
        linear:    m + (1 - m) * (1 - p)
        constant:  1 up to step T - c, then m + (1 - m) * (1 - q)

    Args:
        step: number of optimizer steps already taken, from 0.
        warmup_steps: w; if it is T or more, the run ends inside the warm-up.
        total_steps: T; from step T on the value stays at its end.
        schedule: one of "cosine", "linear", "constant".
        min_fraction: m, in [0, 1].
        cooldown_steps: c, of the constant schedule; 0 stays constant to the end.

    Returns:
        A number in [0, 1].

    Example:
        >>> steps = (0, 1, 2, 6, 10, 11)
        >>> [round(learning_rate_factor(s, warmup_steps=2, total_steps=10), 3) for s in steps]
        [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
        >>> cooled = dict(warmup_steps=0, total_steps=10, schedule="constant", cooldown_steps=4)
        >>> [learning_rate_factor(step, **cooled) for step in (5, 6, 8, 10)]
        [1.0, 1.0, 0.5, 0.0]

    Source:
        Warm-up, cosine and constant with cool-down as in open_clip's ``scheduler.py``
        (``cosine_lr``, ``const_lr_cooldown`` with power 1), for m = 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        since = step - (total_steps - cooldown_steps)
        remaining = 1 - min(since / cooldown_steps, 1.0) if cooldown_steps and since > 0 else 1.0
    else:
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return min_fraction + (1 - min_fraction) * remaining


class PairedOptimizer(Optimizer):
    """Steps one optimizer, then another; groups and state are those of both, in this order.

    Args:
        inner: for the matrices of blocks.
        outer: for the rest; no parameter is in both.

    Example:
        >>> a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        >>> for parameter in (a, b):
        ...     parameter.grad = torch.ones(2)
        >>> pair = PairedOptimizer(torch.optim.SGD([a], lr=0.5), torch.optim.SGD([b], lr=0.25))
        >>> pair.step()
        >>> a.tolist(), b.tolist(), [group["lr"] for group in pair.param_groups]
        ([0.5, 0.5], [0.75, 0.75], [0.5, 0.25])
    """

    def __init__(self, inner: Optimizer, outer: Optimizer) -> None:
        self.parts = (inner, outer)
        self._num_inner = len(inner.param_groups)
        super().__init__([*inner.param_groups, *outer.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both; the closure, which computes the gradients, is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a loaded state, and let both parts have it."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        inner, outer = self.parts
        inner.param_groups = self.param_groups[: self._num_inner]
        outer.param_groups = self.param_groups[self._num_inner :]
        inner.state = outer.state = self.state


_FUSED_DEVICES = frozenset({"cpu", "cuda"})


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of the optimizer and of its learning rate.

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
        cooldown_steps: last steps of a constant schedule, in which it goes down a line; 0 stays
            constant to the end.
        min_learning_rate_fraction: where cosine, line and cool-down end, as a share of
            learning_rate, in [0, 1].
        schedule_start_step: step at which warm-up and schedule begin; they end with the run. 0 but
            for a run that is trained on after its end: the step it has reached, from which it
            warms up and comes down again.
        schedule_steps: step at which the schedule ends, for a run that ends before it and that
            another goes on from; at least ``trainer.max_steps``. Null: the end of the run.
        accept_rate_jump: let the learning rate jump where a run goes on with another
            ``trainer.max_steps``, into the schedule of the new length; False refuses it.
        optimizer: class path of a ``torch.optim.Optimizer`` with init_args of its own, instead of
            AdamW; its learning rate and weight decay come from here, beta1, beta2 and epsilon are
            AdamW's alone. ``torch.optim.Muon`` gets the matrices of blocks, all else (embeddings,
            heads, norms, biases, scale) goes to fallback_optimizer.
        fallback_optimizer: class path of the optimizer of what is no matrix of a block. Null with
            Muon: AdamW. If it is given, any optimizer gets the matrices of blocks only.
        fallback_learning_rate: highest learning rate of the fallback, > 0. Null: learning_rate.

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
    cooldown_steps: int = 0
    schedule_start_step: int = 0
    schedule_steps: int | None = None
    accept_rate_jump: bool = False
    optimizer: Callable[[Iterable[Any]], Optimizer] | None = None
    fallback_optimizer: Callable[[Iterable[Any]], Optimizer] | None = None
    fallback_learning_rate: float | None = None

    def __post_init__(self) -> None:
        fraction = self.min_learning_rate_fraction
        _require("learning_rate", self.learning_rate, self.learning_rate > 0, "> 0, e.g. 1e-3")
        _require("beta1", self.beta1, 0 <= self.beta1 < 1, "in [0, 1), e.g. 0.9")
        _require("beta2", self.beta2, 0 <= self.beta2 < 1, "in [0, 1), e.g. 0.95")
        _require("epsilon", self.epsilon, self.epsilon > 0, "> 0, e.g. 1e-8")
        _require("weight_decay", self.weight_decay, self.weight_decay >= 0, ">= 0; 0 turns it off")
        _require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, ">= 0; 0 turns it off")
        _require("cooldown_steps", self.cooldown_steps, self.cooldown_steps >= 0, ">= 0")
        start = self.schedule_start_step
        _require("schedule_start_step", start, start >= 0, ">= 0; 0 is the start of the run")
        _require("min_learning_rate_fraction", fraction, 0 <= fraction <= 1, "in [0, 1]")
        end = self.schedule_steps
        _require("schedule_steps", end, end is None or end > start, f"above {start}, or null")
        schedules = get_args(Schedule)
        allowed = f"one of {', '.join(schedules)}"
        _require("schedule", self.schedule, self.schedule in schedules, allowed)
        rate = self.fallback_learning_rate
        _require("fallback_learning_rate", rate, rate is None or rate > 0, "> 0, or null")
        cools = self.schedule == "constant" or not self.cooldown_steps
        _require("cooldown_steps", self.cooldown_steps, cools, f"0 with schedule {self.schedule}")

    def total_steps(self, max_steps: int) -> int:
        """Return the step at which the schedule ends; a UserError if the run is longer."""
        end = max_steps if self.schedule_steps is None else self.schedule_steps
        _require("schedule_steps", end, end >= max_steps, f"at least max_steps ({max_steps})")
        return end


def _require(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{name} ({value}) must be {allowed}")


def build_optimizer(
    module: nn.Module,
    config: OptimConfig,
    total_steps: int,
    rules: Mapping[str, ParameterRule] | None = None,
    *,
    scales_gradients: bool = False,
    is_sharded: bool = False,
    in_block: Callable[[str], bool] | None = None,
) -> tuple[Optimizer, LambdaLR]:
    """Build the optimizer and its schedule, which is to be stepped once per optimizer step.

    AdamW is fused where torch has a fused kernel for all parameters (floating point, on CPU or
    CUDA). Build it after the module has been moved to its device.

    Args:
        module: everything that is trained, scale and bias included.
        config: settings.
        total_steps: step at which the schedule ends, see ``OptimConfig.total_steps``; > 0.
        rules: parameters with a learning rate or weight decay of their own, by name.
        scales_gradients: a GradScaler multiplies the loss (float16). A fused optimizer would
            divide by its factor itself, after the gradients were clipped, so none is taken.
        is_sharded: parameters are shards of their whole, of which an optimizer of matrices sees
            too little.
        in_block: whether a parameter of this name lies in a block of a tower, where an optimizer of
            matrices may have it; None takes every matrix.

    Raises:
        UserError: If nothing is trainable, total_steps is not positive, or the optimizer of the
            settings does not take the parameters, is fused where gradients are scaled, wants
            several passes a step (LBFGS), or is one of matrices where there are none or shards.
        RuntimeError: If a trainable parameter is in no group or in two.
    """
    _require("total_steps", total_steps, total_steps > 0, "> 0; set max_steps of the trainer")
    start = config.schedule_start_step
    _require("schedule_start_step", start, start < total_steps, f"below max_steps ({total_steps})")
    ramps = config.warmup_steps + config.cooldown_steps
    if ramps >= total_steps - start and (config.schedule != "constant" or config.cooldown_steps):
        logger.warning(
            "warmup_steps (%d) and cooldown_steps (%d) leave none of the %d steps for the %s "
            "schedule",
            config.warmup_steps,
            config.cooldown_steps,
            total_steps - start,
            config.schedule,
        )
    parts = _parts(module, config, rules, in_block, is_sharded=is_sharded)
    groups = [group for part in parts for group in part]
    if not groups:
        raise UserError("no parameter is trainable; unfreeze a tower, the scale or the bias")
    check_coverage(module, groups)
    factor = partial(scheduled_factor, config, total_steps)
    fused = can_fuse(module) and not scales_gradients
    optimizer = _make(config, config.optimizer, parts[0], fused=fused)
    if len(parts) == 2:
        rest = _make(config, config.fallback_optimizer, parts[1], fused=fused)
        optimizer = PairedOptimizer(optimizer, rest)
    if scales_gradients and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise UserError(
            f"optimizer ({type(optimizer).__name__}) is fused, which cannot be clipped with "
            "precision 16-mixed; give it fused: false, or take bf16-mixed"
        )
    return optimizer, _Schedule(optimizer, factor)


class _Schedule(LambdaLR):
    """A schedule whose rates are those of the settings, in a run that goes on, too."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step of a checkpoint, but no rate of it: its schedule may have been another."""
        base_rates = list(self.base_lrs)
        # Nothing is kept of the factors, and there may be other groups than there were.
        super().load_state_dict({**state_dict, "lr_lambdas": []})
        groups = self.optimizer.param_groups
        before = groups[0]["lr"]
        for group, base, factor in zip(groups, base_rates, self.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = base, base * factor(self.last_epoch)
        self.base_lrs = base_rates
        self._last_lr = [group["lr"] for group in groups]
        now, step = groups[0]["lr"], self.last_epoch
        if not math.isclose(before, now, rel_tol=1e-6):
            text = "learning rate after step %d: %.4g, not %.4g as in the checkpoint"
            logger.info(text, step, now, before)


def scheduled_factor(config: OptimConfig, total_steps: int, step: int) -> float:
    """Share of the highest learning rate at a step of a run; see ``learning_rate_factor``.

    Args:
        config: settings.
        total_steps: step at which the schedule ends.
        step: number of optimizer steps already taken, from 0.
    """
    start = config.schedule_start_step
    return learning_rate_factor(
        max(0, step - start),
        warmup_steps=config.warmup_steps,
        total_steps=total_steps - start,
        schedule=config.schedule,
        min_fraction=config.min_learning_rate_fraction,
        cooldown_steps=config.cooldown_steps,
    )


def _parts(
    module: nn.Module,
    config: OptimConfig,
    rules: Mapping[str, ParameterRule] | None,
    in_block: Callable[[str], bool] | None,
    *,
    is_sharded: bool,
) -> list[list[dict[str, Any]]]:
    """Groups of the one optimizer, or of that of matrices and of the fallback."""
    kind = AdamW if config.optimizer is None else _kind_of(config.optimizer)
    if issubclass(kind, LBFGS):
        raise UserError(
            "optimizer (LBFGS) asks for the loss several times a step, and a step here has one "
            "batch and one pass; take AdamW, SGD or Muon"
        )
    make_groups = partial(parameter_groups, module, weight_decay=config.weight_decay, rules=rules)
    has_fallback = config.fallback_optimizer is not None
    if not has_fallback and not issubclass(kind, Muon):
        if config.fallback_learning_rate is not None:
            raise UserError(
                f"fallback_learning_rate ({config.fallback_learning_rate}) needs optimizer "
                "torch.optim.Muon, or a fallback_optimizer"
            )
        return [make_groups(learning_rate=config.learning_rate)]
    if is_sharded:
        raise UserError(
            f"optimizer ({kind.__name__}) of whole matrices does not go with FullyShardedStrategy, "
            "where a rank has a part of each; leave trainer.strategy out, or take another optimizer"
        )

    def is_inner(name: str, parameter: nn.Parameter) -> bool:
        lies_inside = in_block is None or in_block(name)
        return parameter.ndim == 2 and lies_inside and decays(name, parameter)

    inner = make_groups(learning_rate=config.learning_rate, chosen=is_inner)
    if not inner:
        raise UserError(
            f"optimizer ({kind.__name__}) is for matrices of blocks, and none is trainable; unlock "
            "a tower of transformer blocks, or take another optimizer"
        )
    rate = config.fallback_learning_rate or config.learning_rate
    outer = make_groups(learning_rate=rate, chosen=lambda name, p: not is_inner(name, p))
    for group in inner:
        group["name"] = f"matrices, {group['name']}"
    return [inner, outer] if outer else [inner]


def _kind_of(factory: Callable[[Iterable[Any]], Optimizer]) -> type[Optimizer]:
    """The class a factory makes, from one small matrix; ``Optimizer`` where it takes none."""
    try:
        return type(factory([{"params": [nn.Parameter(torch.zeros(2, 2))]}]))
    except (TypeError, ValueError):
        return Optimizer  # told with its name when it gets the real parameters


def _name_of(factory: Callable[..., Any]) -> str:
    """The class that a configured factory makes, without its addresses in memory."""
    inside = [factory]
    if isinstance(factory, partial):  # jsonargparse hides the class among the arguments
        inside += [factory.func, *factory.args]
    classes = [each for each in inside if isinstance(each, type)]
    return classes[0].__name__ if classes else getattr(factory, "__qualname__", "of a class path")


def _make(
    config: OptimConfig,
    factory: Callable[[Iterable[Any]], Optimizer] | None,
    groups: list[dict[str, Any]],
    *,
    fused: bool,
) -> Optimizer:
    if factory is None:
        betas = (config.beta1, config.beta2)
        return AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=fused)
    try:
        return factory(groups)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optimizer ({_name_of(factory)}) does not take the parameters: "
            f"{' '.join(str(error).split())}"
        ) from error


def can_fuse(module: nn.Module) -> bool:
    """Whether fused AdamW can move every trainable parameter of a module."""
    return all(
        parameter.device.type in _FUSED_DEVICES and parameter.is_floating_point()
        for parameter in module.parameters()
        if parameter.requires_grad
    )


_NO_JUMP = 1e-3  # of the highest rate


def describe_schedule_change(
    before: OptimConfig, steps_before: int, now: OptimConfig, steps_now: int, step: int
) -> str:
    """Say what becomes of the learning rate of a run that goes on with another length.

    Args:
        before: settings that the run had.
        steps_before: where its schedule ended with them, in optimizer steps.
        now: settings that it has now.
        steps_now: where it ends with them.
        step: optimizer steps behind it, fewer than ``steps_now``.

    Returns:
        One line for the log; empty if nothing has changed.

    Raises:
        UserError: if the rate would jump and the settings do not ask for it, or
            schedule_start_step is ahead of the run.

    Example:
        >>> flat = OptimConfig(learning_rate=0.5, schedule="constant")
        >>> describe_schedule_change(flat, 12, flat, 24, step=12)
        'max_steps was 12 and is 24: the learning rate goes on at 0.5, constant to step 24'
    """
    start = now.schedule_start_step
    if start > step:
        raise UserError(
            f"model.optim.schedule_start_step ({start}) must be at most the step training goes on "
            f"from ({step})"
        )
    starts_anew = start != before.schedule_start_step
    if steps_before == steps_now and not starts_anew:
        return ""
    old, new = (
        scheduled_factor(config, steps, step)
        for config, steps in ((before, steps_before), (now, steps_now))
    )
    old_rate, new_rate = (f"{now.learning_rate * factor:.4g}" for factor in (old, new))
    changed = f"max_steps was {steps_before} and is {steps_now}"
    if starts_anew:
        return (
            f"{changed}: the {now.schedule} schedule starts anew at step {start}; the learning "
            f"rate of the next step is {new_rate}, the old schedule's was {old_rate}"
        )
    if math.isclose(old, new, abs_tol=_NO_JUMP):
        return f"{changed}: the learning rate goes on at {new_rate}, {now.schedule} to step " + str(
            steps_now
        )
    if not now.accept_rate_jump:
        raise UserError(
            f"trainer.max_steps ({steps_now}) was {steps_before} up to step {step}: the learning "
            f"rate would jump from {old_rate} to {new_rate}, into the {now.schedule} schedule of "
            f"the new length; set model.optim.schedule_start_step to {step} to warm up and come "
            "down again from there, model.optim.accept_rate_jump to true, or max_steps to "
            f"{steps_before}"
        )
    return (
        f"{changed}: the learning rate jumps from {old_rate} to {new_rate} and follows the "
        f"{now.schedule} schedule of the new length"
    )


def how_to_go_on(config: OptimConfig, step: int) -> str:
    """Say how a run that is complete is trained on.

    Example:
        >>> how_to_go_on(OptimConfig(schedule="constant"), 12)
        'raise trainer.max_steps'
    """
    is_flat = config.schedule == "constant" and not config.cooldown_steps
    if is_flat or step < (config.schedule_steps or 0):
        return "raise trainer.max_steps"
    return f"raise trainer.max_steps and set model.optim.schedule_start_step to {step}"
