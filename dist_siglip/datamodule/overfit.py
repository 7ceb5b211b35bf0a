"""Train on the same few batches again and again: ``trainer.overfit_batches``."""

import logging

from lightning.pytorch import Trainer

from dist_siglip.errors import UserError

logger = logging.getLogger(__name__)


def batches_to_repeat(trainer: Trainer | None) -> int | None:
    """Return how many batches, the first of the run, are trained on in turns; None for all.

    Lightning turns shuffling off and takes the first batches of each epoch, which here are others
    in each. So the sampler repeats them, and the loader runs on without end.

    Raises:
        UserError: if a share is asked for: the training data has no end.
    """
    asked: int | float = getattr(trainer, "overfit_batches", 0)  # not set in a script of one's own
    if trainer is None or not asked:
        return None
    if not isinstance(asked, int):
        raise UserError(
            f"trainer.overfit_batches ({asked}) must be a whole number of batches: the training "
            "data has no end to take a share of"
        )
    trainer.limit_train_batches = 1.0
    logger.info(
        "overfit_batches: trains on the first %d batches of the run, in turns; an evaluation sees "
        "as many batches of each rank",
        asked,
    )
    return asked
