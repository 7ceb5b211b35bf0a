"""Objectives beside the pairwise loss: they read patch tokens and views, and know no ranks."""

from dist_siglip.objectives.captioning import Captioning
from dist_siglip.objectives.decoder import CaptionWriting
from dist_siglip.objectives.objective import (
    Need,
    Objective,
    Regions,
    Rows,
    Targets,
    Term,
    uniform,
)
from dist_siglip.objectives.prototypes import prototype_losses
from dist_siglip.objectives.self_distillation import (
    MaskedPrediction,
    SelfDistillation,
    TeacherObjective,
)
from dist_siglip.objectives.token_loss import token_losses

__all__ = [
    "CaptionWriting",
    "Captioning",
    "MaskedPrediction",
    "Need",
    "Objective",
    "Regions",
    "Rows",
    "SelfDistillation",
    "Targets",
    "TeacherObjective",
    "Term",
    "prototype_losses",
    "token_losses",
    "uniform",
]
