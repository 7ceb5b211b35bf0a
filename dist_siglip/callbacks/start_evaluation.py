"""How good was the checkpoint before the first step?"""

import logging
import math

from lightning.pytorch import Callback, LightningModule, Trainer

from dist_siglip.metrics.evaluation import describe_gallery

logger = logging.getLogger(__name__)


class StartEvaluation(Callback):
    """Evaluates a new run before its first step, and logs that as the evaluation of step 0.

    It takes the place of Lightning's sanity check and needs ``num_sanity_val_steps`` of -1: a check
    of a few batches is no evaluation.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was found; Lightning itself logs nothing of a sanity check."""
        evaluation = getattr(pl_module, "last_evaluation", None)
        is_whole = trainer.num_sanity_val_steps == math.inf
        if evaluation is None or not is_whole or not trainer.is_global_zero:
            return
        values = {f"val/{name}": value for name, value in evaluation.metrics.items()}
        for each in trainer.loggers:
            each.log_metrics(values, step=0)
        shown = ("image_to_text_recall@1", "text_to_image_recall@1", "loss", "modality_gap")
        parts = [f"{name} {values[f'val/{name}']:.4g}" for name in shown]
        pairs = describe_gallery(evaluation.metrics)
        logger.info("before the first step, on %s: %s", pairs, ", ".join(parts))
