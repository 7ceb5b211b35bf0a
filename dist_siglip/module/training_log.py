"""What is written down about a training step?"""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dist_siglip.distributed import sum_over_ranks
from dist_siglip.health.step_timing import Pace


def log_training(
    module: LightningModule,
    loss: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    num_substituted: Tensor | int,
    pace: Pace,
) -> None:
    """Log global values; one small all-reduce, on logged steps only.

    Args:
        module: under training; its ``loss``, if it has one, may count duplicate captions.
        loss: this rank's share, whose mean over ranks is the loss.
        logit_scale: of the step.
        logit_bias: of the step.
        num_substituted: samples of this rank so far that stood in for bad ones.
        pace: of this rank; keeps that of all ranks.
    """
    loss_module = getattr(module, "loss", None)
    duplicates: Tensor | None = getattr(loss_module, "last_duplicate_pairs", None)
    counts = (num_substituted, 0 if duplicates is None else duplicates)
    sums = torch.stack([loss.detach(), *(torch.as_tensor(count).to(loss) for count in counts)])
    row = pace.take_row(module.trainer.global_rank, module.trainer.world_size)
    sums = sum_over_ranks(torch.cat([sums, row.to(sums)]))
    loss_sum, all_substituted, num_duplicates = sums[:3].unbind()
    pace.keep_sum(sums[3:])
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
