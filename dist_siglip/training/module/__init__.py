"""Lightning modules: a dual encoder with its loss, metrics and optimizer."""

from dist_siglip.training.module.siglip import SigLipModule
from dist_siglip.training.module.trained import load_trained

__all__ = ["SigLipModule", "load_trained"]
