"""Sample-exact batches for a Lightning run."""

from dist_siglip.training.datamodule.image_text import ImageTextDataModule
from dist_siglip.training.datamodule.sources import TrainSource
from dist_siglip.training.datamodule.training_position import refuse_accumulation

__all__ = ["ImageTextDataModule", "TrainSource", "refuse_accumulation"]
