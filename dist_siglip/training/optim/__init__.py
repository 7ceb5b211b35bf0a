"""Optimizer, parameter groups, learning-rate schedule, and the check of a step."""

from dist_siglip.training.optim.build import (
    OptimConfig,
    Schedule,
    build_optimizer,
    describe_schedule_change,
    how_to_go_on,
    learning_rate_factor,
)
from dist_siglip.training.optim.groups import ParameterRule
from dist_siglip.training.optim.step_check import NormHistory, StepCheck, StepFinding

__all__ = [
    "NormHistory",
    "OptimConfig",
    "ParameterRule",
    "Schedule",
    "StepCheck",
    "StepFinding",
    "build_optimizer",
    "describe_schedule_change",
    "how_to_go_on",
    "learning_rate_factor",
]
