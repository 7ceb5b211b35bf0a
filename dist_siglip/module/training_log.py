"""What is written down about a training step?"""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dist_siglip.distributed import sum_over_ranks


def log_training(
    module: LightningModule,
    loss: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    num_substituted: Tensor | int,
) -> None:
    """Log global values; one small all-reduce, on logged steps only.

    Args:
        module: under training; its ``loss`` may count duplicate captions.
        loss: this rank's share, whose mean over ranks is the loss.
        logit_scale: of the step.
        logit_bias: of the step.
        num_substituted: samples of this rank so far that stood in for bad ones.
    """
    duplicates: Tensor | None = getattr(module.loss, "last_duplicate_pairs", None)
    counts = (num_substituted, 0 if duplicates is None else duplicates)
    sums = torch.stack([loss.detach(), *(torch.as_tensor(count).to(loss) for count in counts)])
    loss_sum, all_substituted, num_duplicates = sum_over_ranks(sums).unbind()
    if duplicates is not None:
        module.log("train/duplicate_captions", num_duplicates)
    groups = module.trainer.optimizers[0].param_groups
    module.log_dict(
        {
            "train/loss": loss_sum / module.trainer.world_size,
            "train/logit_scale": logit_scale.detach(),
            "train/logit_bias": logit_bias.detach(),
            "train/relative_bias": (-logit_bias / logit_scale).detach(),
            "train/learning_rate": max(group["lr"] for group in groups),
            "train/substituted_samples": all_substituted,
        }
    )
