"""Scale and bias of a module: whether its loss has a bias, and their fit to pairs."""

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from dist_siglip.data.samples.batch import picture_ids_of
from dist_siglip.distributed import World
from dist_siglip.errors import UserError
from dist_siglip.losses import LogitScaleBias
from dist_siglip.losses.arguments import duplicates_of, mined_of, uses_logit_bias
from dist_siglip.losses.calibration import Calibration, calibrate_on_features, set_logits
from dist_siglip.losses.kernels.pair_terms import Duplicates
from dist_siglip.models import evaluation_mode
from dist_siglip.training.datamodule.calibration_subset import subset_loader
from dist_siglip.training.module.encoding import EncodingModule

logger = logging.getLogger(__name__)


class CalibratedModule(EncodingModule):
    """Knows whether its loss has a bias, and fits scale and bias to pairs."""

    loss: nn.Module
    logits: LogitScaleBias
    global_batch_size: int | None

    def check_can_calibrate(self) -> int:
        """Return the global batch to calibrate for.

        Raises:
            UserError: if it is not known, or the loss has no bias to calibrate.
        """
        if not self._uses_bias:
            raise UserError(
                f"loss ({type(self.loss).__name__}) uses no bias: only a sigmoid loss can be "
                "calibrated; set calibration_pairs to null"
            )
        if self.global_batch_size is None:
            raise UserError("global_batch_size (null) must be known to calibrate for it")
        return self.global_batch_size

    def calibrate(
        self,
        image_features: Tensor,
        text_features: Tensor,
        caption_ids: Tensor,
        picture_ids: Tensor | None = None,
    ) -> Calibration:
        """Fit scale and bias to the pairs of all ranks; changes nothing.

        Args:
            image_features: (B, D), L2-normalised, this rank's.
            text_features: (B, D), L2-normalised.
            caption_ids: (B,), equal for equal captions.
            picture_ids: (B,), equal for equal pictures; None if they are not known.

        Raises:
            UserError: as ``check_can_calibrate``, or if no scale above 0 fits.
        """
        global_batch_size = self.check_can_calibrate()
        texts = 1 + self.num_negatives  # for each pair
        mined, mined_weight = mined_of(self.loss)
        scale, bias = (value.item() for value in self.logits())
        return calibrate_on_features(
            image_features,
            text_features,
            global_batch_size * texts,  # as many as an image meets
            scale_before=scale,
            bias_before=bias,
            caption_ids=caption_ids,
            picture_ids=picture_ids,
            duplicates=self._duplicates,
            # The same share of them, and the same sum.
            mined_negatives=mined * texts,
            mined_weight=mined_weight / texts,
        )

    @property
    def _uses_bias(self) -> bool:
        return uses_logit_bias(self.loss)

    @property
    def _duplicates(self) -> Duplicates:
        """What the loss makes of equal captions; unheeded is negative."""
        return duplicates_of(self.loss) or "negative"

    def _freeze_bias(self) -> None:
        """Keep a parameter that the loss never touches from stopping DDP."""
        for name, parameter in self.logits.named_parameters():
            if name != "log_scale" and parameter.requires_grad:
                parameter.requires_grad_(False)
                logger.info("%s uses no bias: %s is frozen", type(self.loss).__name__, name)


def warn_of_mining(loss: nn.Module, *, is_calibrated: bool) -> None:
    """Say what mined negatives do to the best bias, and that equal captions may be mined."""
    mined, weight = mined_of(loss)
    if not mined:
        return
    if not is_calibrated:
        logger.warning(
            "mined_negatives (%d): the hardest negatives count %g times, and the best bias is up "
            "to %.1f lower; set model.calibration_pairs to begin near it",
            mined,
            1 + weight,
            math.log1p(weight),
        )
    if duplicates_of(loss) is None:
        logger.warning(
            "mined_negatives (%d) without duplicates: a picture's caption that occurs again in a "
            "batch is its hardest negative; set duplicates of the loss to positive or masked",
            mined,
        )


@torch.no_grad()
def calibrate_to_training_pairs(module: CalibratedModule, num_pairs: int) -> None:
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
    loader = subset_loader(data.train_dataset, num_pairs, data, world)
    rows = []
    with evaluation_mode(module.towers), trainer.precision_plugin.forward_context():
        for loaded in loader:
            batch = module.transfer_batch_to_device(loaded, module.device, 0)
            batch = data.on_after_batch_transfer(batch, 0)
            rows.append((*module.encode(batch), batch.caption_ids, picture_ids_of(batch)))
    fitted = module.calibrate(*(torch.cat(column) for column in zip(*rows, strict=True)))
    set_logits(module.logits, fitted)
    logger.info("calibrated before the first step: %s", fitted.describe())
