"""Sample-exact data: webdataset shards in, batches of picture-text pairs out.

Index -> order -> position -> fetch -> decode: which samples exist, in which order an epoch visits
them, which of them a rank takes, how their bytes arrive and what they become.
"""

from dist_siglip.data.index.pairs import PairTable, build_pair_table
from dist_siglip.data.order.position import (
    BatchPlan,
    EvaluationBatchSampler,
    GlobalBatchSampler,
    Progress,
)
from dist_siglip.data.order.sequence import StreamPosition, epoch_order
from dist_siglip.data.samples.batch import ImageNormalizer, ImageTextBatch, PairCollator, PairSample
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.identity import caption_id
from dist_siglip.data.samples.regions import RegionRule
from dist_siglip.data.samples.stages import (
    ColorJitter,
    RandAugment,
    RandomAffine,
    RandomFlip,
    TimmAugment,
)
from dist_siglip.data.samples.transforms import (
    Preprocessing,
    ViewTransform,
    evaluation_transform,
    training_transform,
)
from dist_siglip.data.urls import expand_shards
from dist_siglip.system.moved import look_up_in

__all__ = [
    "BatchPlan",
    "ColorJitter",
    "EvaluationBatchSampler",
    "GlobalBatchSampler",
    "ImageNormalizer",
    "ImageTextBatch",
    "PairCollator",
    "PairDataset",
    "PairSample",
    "PairTable",
    "Preprocessing",
    "Progress",
    "RandAugment",
    "RandomAffine",
    "RandomFlip",
    "RegionRule",
    "StreamPosition",
    "TimmAugment",
    "ViewTransform",
    "build_pair_table",
    "caption_id",
    "epoch_order",
    "evaluation_transform",
    "expand_shards",
    "training_transform",
]

__getattr__ = look_up_in(__name__)
