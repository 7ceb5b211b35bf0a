"""The sigmoid loss of a few pairs out of all: positives and chosen negatives.

A head that judges one pair at a time (``dist_siglip.models.reranker``) cannot be asked about
all pairs of a batch. The sigmoid loss is a sum over pairs, so it can be taken over some of them;
there is no normaliser that would need the others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import resolve_group, sum_over_ranks
from dist_siglip.errors import UserError


def match_loss(
    positive_logits: Tensor, negative_logits: Tensor, *, group: ProcessGroup | None = None
) -> Tensor:
    """Sigmoid loss of this rank's positives and of the negatives chosen for them.

    With N positives on W ranks:

        loss = W/N * (sum_{own positives} softplus(-z) + sum_{own negatives} softplus(z))

    Distributed contract: every rank passes its own pairs, any number of either (0 too); the mean
    over ranks of the returned value is the loss of the global batch, and the mean over ranks of
    the gradients is its gradient, for even and uneven batches. One all-reduce of one number;
    backward communicates nothing.

    Args:
        positive_logits: (B,), of matching pairs.
        negative_logits: (M,), of pairs that do not match.
        group: process group; the default group if None.

    Returns:
        (), float32, float64 for float64 logits; a sum over pairs times W/N.

    Raises:
        UserError: if logits are not one-dimensional or not floating-point.

    Example:
        >>> match_loss(torch.tensor([0.0, 2.0]), torch.tensor([-3.0]))
        tensor(0.4343)

    Source:
        Zhai et al. 2023, arXiv:2303.15343, Algorithm 1, over some of the pairs as in their Figure
        6, where leaving out all but the hardest negatives keeps the quality.
    """
    for name, logits in (("positive", positive_logits), ("negative", negative_logits)):
        if logits.ndim != 1 or not logits.is_floating_point():
            raise UserError(
                f"{name}_logits {tuple(logits.shape)} ({logits.dtype}) must be one-dimensional "
                "floating-point numbers, one per pair"
            )
    group = resolve_group(group)
    world_size = 1 if group is None else group.size()
    num_pairs = torch.tensor(len(positive_logits), device=positive_logits.device)
    num_pairs = sum_over_ranks(num_pairs, group).clamp(min=1)
    wide = torch.promote_types(positive_logits.dtype, torch.float32)
    positive, negative = positive_logits.to(wide), negative_logits.to(wide)
    # softplus(z) is log(1 + exp(z)) without overflow and without an epsilon.
    total = F.softplus(-positive).sum() + F.softplus(negative).sum()
    return total * world_size / num_pairs
