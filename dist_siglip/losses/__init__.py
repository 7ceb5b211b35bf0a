"""Losses over the global batch, their tiles, and the scale and bias of the logits."""

from dist_siglip.losses.adapter import SimplexAdapter
from dist_siglip.losses.clip import ClipLoss
from dist_siglip.losses.drop_in import SigLipLoss
from dist_siglip.losses.geometry import alignment_loss, cross_uniformity_loss, uniformity_loss
from dist_siglip.losses.matching import match_loss
from dist_siglip.losses.modalities import ModalityGraph, multimodal_sigmoid_loss
from dist_siglip.losses.relevance import relevance_sigmoid_loss, relevance_softmax_loss
from dist_siglip.losses.scale import BiasParameterization, LogitConfig, LogitScaleBias
from dist_siglip.losses.sigmoid import siglip_loss
from dist_siglip.losses.softmax import softmax_loss
from dist_siglip.losses.weighted import WeightedLoss

__all__ = [
    "BiasParameterization",
    "ClipLoss",
    "LogitConfig",
    "LogitScaleBias",
    "ModalityGraph",
    "SigLipLoss",
    "SimplexAdapter",
    "WeightedLoss",
    "alignment_loss",
    "cross_uniformity_loss",
    "match_loss",
    "multimodal_sigmoid_loss",
    "relevance_sigmoid_loss",
    "relevance_softmax_loss",
    "siglip_loss",
    "softmax_loss",
    "uniformity_loss",
]
