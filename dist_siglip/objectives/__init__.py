"""Objectives beside the pairwise loss: they read patch tokens, and know no ranks."""

from dist_siglip.objectives.captioning import Captioning
from dist_siglip.objectives.decoder import CaptionWriting
from dist_siglip.objectives.objective import Need, Objective, Regions, Rows, Term, uniform
from dist_siglip.objectives.token_loss import token_losses

__all__ = [
    "CaptionWriting",
    "Captioning",
    "Need",
    "Objective",
    "Regions",
    "Rows",
    "Term",
    "token_losses",
    "uniform",
]
