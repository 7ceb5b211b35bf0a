"""How the parameters move: groups, schedule, optimizer."""

from dist_siglip.optim.build import OptimConfig, build_optimizer
from dist_siglip.optim.groups import ParameterRule
from dist_siglip.optim.schedule import Schedule, learning_rate_factor

__all__ = [
    "OptimConfig",
    "ParameterRule",
    "Schedule",
    "build_optimizer",
    "learning_rate_factor",
]
