"""Losses over the global batch, their tiles, and the scale and bias of the logits."""

from dist_siglip.losses.arguments import LossOutput, TeacherFeatures
from dist_siglip.losses.composite import DistillationLoss, WeightedLoss
from dist_siglip.losses.distillation import distillation_loss
from dist_siglip.losses.geometry import alignment_loss, cross_uniformity_loss, uniformity_loss
from dist_siglip.losses.logit_scale import BiasParameterization, LogitConfig, LogitScaleBias
from dist_siglip.losses.matryoshka import matryoshka_sigmoid_loss, matryoshka_softmax_loss
from dist_siglip.losses.modules import ClipLoss, MatryoshkaLoss, SigLipLoss
from dist_siglip.losses.research.adapter import SimplexAdapter
from dist_siglip.losses.research.modalities import ModalityGraph, multimodal_sigmoid_loss
from dist_siglip.losses.research.relevance import relevance_sigmoid_loss, relevance_softmax_loss
from dist_siglip.losses.sampled_pairs import match_loss
from dist_siglip.losses.sigmoid import siglip_loss
from dist_siglip.losses.softmax import softmax_loss

__all__ = [
    "BiasParameterization",
    "ClipLoss",
    "DistillationLoss",
    "LogitConfig",
    "LogitScaleBias",
    "LossOutput",
    "MatryoshkaLoss",
    "ModalityGraph",
    "SigLipLoss",
    "SimplexAdapter",
    "TeacherFeatures",
    "WeightedLoss",
    "alignment_loss",
    "cross_uniformity_loss",
    "distillation_loss",
    "match_loss",
    "matryoshka_sigmoid_loss",
    "matryoshka_softmax_loss",
    "multimodal_sigmoid_loss",
    "relevance_sigmoid_loss",
    "relevance_softmax_loss",
    "siglip_loss",
    "softmax_loss",
    "uniformity_loss",
]
