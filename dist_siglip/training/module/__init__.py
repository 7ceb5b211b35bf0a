"""The Lightning module: a dual encoder, its loss, its metrics and its optimizer, wired."""

from dist_siglip.training.module.siglip import SigLipModule
from dist_siglip.training.module.trained import load_trained

__all__ = ["SigLipModule", "load_trained"]
