"""How the parameters move: groups, schedule, optimizer."""

from dist_siglip.optim.build import OptimConfig, build_optimizer
from dist_siglip.optim.groups import ParameterRule
from dist_siglip.optim.schedule import Schedule, learning_rate_factor
from dist_siglip.optim.schedule_change import describe_schedule_change, how_to_go_on
from dist_siglip.optim.spike import NormHistory
from dist_siglip.optim.step_check import StepCheck, StepFinding

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
