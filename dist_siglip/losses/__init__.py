"""Losses over the global batch, their tiles, and the scale and bias of the logits."""

from dist_siglip.losses.drop_in import SigLipLoss
from dist_siglip.losses.scale import BiasParameterization, LogitConfig, LogitScaleBias
from dist_siglip.losses.sigmoid import siglip_loss

__all__ = ["BiasParameterization", "LogitConfig", "LogitScaleBias", "SigLipLoss", "siglip_loss"]
