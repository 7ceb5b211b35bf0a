"""Sample-exact batches for a Lightning run."""

from dist_siglip.datamodule.image_text import ImageTextDataModule
from dist_siglip.datamodule.position_counter import refuse_accumulation
from dist_siglip.datamodule.sources import TrainSource

__all__ = ["ImageTextDataModule", "TrainSource", "refuse_accumulation"]
