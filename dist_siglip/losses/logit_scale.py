"""Learnable scale and bias of the logits.

Two parameterisations of the same function. Absolute: logits = scale * similarity + bias.
Relative: logits = scale * (similarity - relative_bias); then a step of the scale does not move
the similarity at which a pair is judged (Bangachev et al.). They convert without loss:
bias = -scale * relative_bias.
"""

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_siglip.errors import UserError

BiasParameterization = Literal["absolute", "relative"]
# Of SigLIP (Zhai et al., section 3.2).
START_SCALE = 10.0
START_BIAS = -10.0


@dataclass(frozen=True, kw_only=True)
class LogitConfig:
    """Start and training of the logits' scale and bias.

    Args:
        start_scale: first multiplier, > 0. Null: the loaded weights' own, else 10.
        start_bias: first number added to the logits. Null: the loaded weights' own, else -10.
        bias_parameterization: whether the parameter is the bias or the relative bias
            (-bias / scale).
        train_scale: whether the scale learns.
        train_bias: whether the bias learns.
    """

    start_scale: float | None = None
    start_bias: float | None = None
    bias_parameterization: BiasParameterization = "absolute"
    train_scale: bool = True
    train_bias: bool = True


class LogitScaleBias(nn.Module):
    """Holds log_scale and logit_bias, or log_scale and relative_bias; returns scale and bias.

    Parameters have one element and one dimension (FSDP2 rejects 0-d parameters) and stay in
    float32 when a model around them goes to half precision. There is no clamp: published SigLIP
    checkpoints have a scale above the customary limit of 100.

    The state of one parameterisation loads into the other and keeps the function: the bias is
    converted in float64. Moments of an optimizer are not; continue a run with its own.

    Args:
        start_scale: multiplier at the start, > 0. SigLIP starts at 10.
        start_bias: number added to the logits at the start, whatever the parameterisation.
        bias_parameterization: which of the two numbers is the parameter.
        train_scale: whether the scale learns.
        train_bias: whether the bias learns. A frozen relative bias still moves the absolute one
            when the scale learns.

    Raises:
        UserError: if start_scale is not a positive number or start_bias is not finite.

    Example:
        >>> logits = LogitScaleBias(bias_parameterization="relative")
        >>> scale, bias = logits()
        >>> round(scale.item(), 4), round(bias.item(), 4), logits.relative_bias.item()
        (10.0, -10.0, 1.0)

    Source:
        Zhai et al. 2023, arXiv:2303.15343, Algorithm 1 (scale 10, bias -10); Bangachev et al.
        2025, arXiv:2509.18552, Definition 1, where our relative_bias is their b_rel.
    """

    logit_bias: nn.Parameter
    relative_bias: nn.Parameter

    def __init__(
        self,
        start_scale: float = START_SCALE,
        start_bias: float = START_BIAS,
        *,
        bias_parameterization: BiasParameterization = "absolute",
        train_scale: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__()
        if not (start_scale > 0 and math.isfinite(start_scale)):
            raise UserError(f"start_scale ({start_scale}) must be a finite number above 0")
        if not math.isfinite(start_bias):
            raise UserError(f"start_bias ({start_bias}) must be finite")
        if bias_parameterization not in ("absolute", "relative"):
            raise UserError(
                f"bias_parameterization ({bias_parameterization!r}) must be absolute or relative"
            )
        self.bias_parameterization = bias_parameterization
        is_relative = bias_parameterization == "relative"
        self.log_scale = nn.Parameter(
            torch.tensor([math.log(start_scale)]), requires_grad=train_scale
        )
        # The name in the checkpoint says which of the two numbers it is.
        self.register_parameter(
            "relative_bias" if is_relative else "logit_bias",
            nn.Parameter(
                torch.tensor([-start_bias / start_scale if is_relative else start_bias]),
                requires_grad=train_bias,
            ),
        )

    @classmethod
    def from_config(
        cls, config: LogitConfig, *, start_scale: float, start_bias: float
    ) -> "LogitScaleBias":
        """Build from settings; ``start_scale`` and ``start_bias`` stand in where they say None."""
        return cls(
            start_scale if config.start_scale is None else config.start_scale,
            start_bias if config.start_bias is None else config.start_bias,
            bias_parameterization=config.bias_parameterization,
            train_scale=config.train_scale,
            train_bias=config.train_bias,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LogitScaleBias":
        """Move and widen like any module, but never narrow: bfloat16 has 3 digits."""

        def keep_precision(value: Tensor) -> Tensor:
            moved = fn(value)
            is_narrower = moved.dtype.itemsize < value.dtype.itemsize
            return value.to(moved.device) if is_narrower else moved

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any
    ) -> None:
        """Convert the bias if the state holds the other parameterisation."""
        mine, other = "logit_bias", "relative_bias"
        if self.bias_parameterization == "relative":
            mine, other = other, mine
        names = [prefix + name for name in ("log_scale", other)]
        if prefix + mine not in state_dict and all(name in state_dict for name in names):
            # load_state_dict hands over a copy of its own: the caller's dict stays as it is.
            log_scale, value = state_dict[names[0]], state_dict.pop(names[1])
            scale = log_scale.double().exp()
            wide = value.double()
            converted = -wide / scale if mine == "relative_bias" else -wide * scale
            state_dict[prefix + mine] = converted.to(value.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return (logit_scale, logit_bias), both 0-d and with gradients."""
        # The sum of one element: FSDP2 warns of outputs that are views of a parameter.
        scale = self.log_scale.exp().sum()
        if self.bias_parameterization == "relative":
            return scale, -scale * self.relative_bias.sum()
        return scale, self.logit_bias.sum()
