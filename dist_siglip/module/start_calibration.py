"""Which scale and bias suit the training pairs before the first step?"""

import logging
from typing import TYPE_CHECKING, Any

import torch

from dist_siglip.data.samples.batch import picture_ids_of
from dist_siglip.data.samples.calibration_subset import excerpt_loader
from dist_siglip.distributed import World
from dist_siglip.errors import UserError
from dist_siglip.losses.calibration import set_logits
from dist_siglip.models import evaluation_mode

if TYPE_CHECKING:
    from dist_siglip.module.siglip import SigLipModule

logger = logging.getLogger(__name__)


@torch.no_grad()
def calibrate_to_training_pairs(module: "SigLipModule", num_pairs: int) -> None:
    """Embed pairs of the training data as in an evaluation, fit scale and bias, set them.

    Args:
        module: attached to a trainer.
        num_pairs: over all ranks.

    Raises:
        UserError: if the loss cannot be calibrated, or the trainer has no data module of ours.
    """
    module.check_can_calibrate()
    trainer = module.trainer
    data: Any = getattr(trainer, "datamodule", None)
    if getattr(data, "train_dataset", None) is None:
        raise UserError(
            f"calibration_pairs ({num_pairs}) needs an ImageTextDataModule in trainer.fit; "
            "without one, set it to null and use losses.calibration"
        )
    world = World(rank=trainer.global_rank, world_size=trainer.world_size)
    loader = excerpt_loader(data.train_dataset, num_pairs, data, world)
    rows = []
    with evaluation_mode(module.towers), trainer.precision_plugin.forward_context():
        for loaded in loader:
            batch = module.transfer_batch_to_device(loaded, module.device, 0)
            batch = data.on_after_batch_transfer(batch, 0)
            rows.append((*module.encode(batch), batch.caption_ids, picture_ids_of(batch)))
    fitted = module.calibrate(*(torch.cat(column) for column in zip(*rows, strict=True)))
    set_logits(module.logits, fitted)
    logger.info("calibrated before the first step: %s", fitted.describe())
