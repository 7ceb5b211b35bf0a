"""Sample-exact data: webdataset shards in, batches of picture-text pairs out.

Index -> order -> position -> fetch -> decode: which samples exist, in which order an epoch visits
them, which of them a rank takes, how their bytes arrive and what they become.
"""

from dist_siglip.data.batch import ImageTextBatch, PairCollator, PairSample
from dist_siglip.data.captions import caption_id
from dist_siglip.data.dataset import PairDataset
from dist_siglip.data.inputs import ModelInputs
from dist_siglip.data.normalize import ImageNormalizer
from dist_siglip.data.order import epoch_order
from dist_siglip.data.pairs import PairTable, build_pair_table
from dist_siglip.data.position import (
    BatchPlan,
    EvaluationBatchSampler,
    GlobalBatchSampler,
    Progress,
)
from dist_siglip.data.slot import Slot
from dist_siglip.data.transforms import evaluation_transform, training_transform
from dist_siglip.data.urls import expand_shards

__all__ = [
    "BatchPlan",
    "EvaluationBatchSampler",
    "GlobalBatchSampler",
    "ImageNormalizer",
    "ImageTextBatch",
    "ModelInputs",
    "PairCollator",
    "PairDataset",
    "PairSample",
    "PairTable",
    "Progress",
    "Slot",
    "build_pair_table",
    "caption_id",
    "epoch_order",
    "evaluation_transform",
    "expand_shards",
    "training_transform",
]
