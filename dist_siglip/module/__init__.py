"""The Lightning module: a dual encoder, its loss, its metrics and its optimizer, wired."""

from dist_siglip.module.siglip import SigLipModule

__all__ = ["SigLipModule"]
