"""The Lightning module: a dual encoder, its loss, its metrics and its optimizer, wired."""

from dist_siglip.module.siglip import SigLipModule
from dist_siglip.module.trained import load_trained

__all__ = ["SigLipModule", "load_trained"]
