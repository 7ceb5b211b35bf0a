"""Objectives beside the pairwise loss: they read patch tokens, and know no ranks."""

from dist_siglip.objectives.captioning import Captioning, CaptionWriting
from dist_siglip.objectives.objective import Need, Objective, Rows, Term, uniform
from dist_siglip.objectives.token_loss import token_losses

__all__ = [
    "CaptionWriting",
    "Captioning",
    "Need",
    "Objective",
    "Rows",
    "Term",
    "token_losses",
    "uniform",
]
