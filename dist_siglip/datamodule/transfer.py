"""What happens to a batch on its way to the device of the run?"""

from functools import cached_property

from lightning.pytorch import LightningDataModule

from dist_siglip.data.batch import ImageTextBatch
from dist_siglip.data.faults import BadSampleLimit
from dist_siglip.data.inputs import ModelInputs
from dist_siglip.data.normalize import ImageNormalizer


class BatchTransfer(LightningDataModule):
    """The hooks of Lightning around the transfer of a batch."""

    inputs: ModelInputs | None
    bad_samples: BadSampleLimit

    def on_before_batch_transfer(
        self, batch: ImageTextBatch, dataloader_idx: int
    ) -> ImageTextBatch:
        """Count substitutes while the batch is still on the CPU."""
        if self.trainer is not None and self.trainer.training:
            self.bad_samples.count(int(batch.substituted.sum()))
        return batch

    def on_after_batch_transfer(self, batch: ImageTextBatch, dataloader_idx: int) -> ImageTextBatch:
        """Normalise the pictures where they are now, in the precision of the run."""
        batch = self._normalize(batch)
        if self.trainer is None:
            return batch
        return batch._replace(images=self.trainer.precision_plugin.convert_input(batch.images))

    @cached_property
    def _normalize(self) -> ImageNormalizer:
        assert self.inputs is not None  # setup has checked it
        return ImageNormalizer(self.inputs.mean, self.inputs.std)
