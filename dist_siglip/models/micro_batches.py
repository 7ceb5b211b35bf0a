"""The features of a whole local batch in the memory of a part of it, with exact gradients.

A contrastive loss needs the features of the whole batch at once, but not the activations that
made them. So each tower encodes one micro-batch after the other and keeps nothing of it but its
features; the loss runs once, on all of them; backward encodes one micro-batch at a time again,
with the random numbers and the autocast of the first time, and takes its gradient. Parameters
collect the sum over micro-batches before anything else (DDP's exchange, clipping) sees it.

Cost: one more forward pass. Memory: activations of one micro-batch of one tower, features of all.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dist_siglip.errors import UserError
from dist_siglip.models.dual_encoder import DualEncoder


def encode_in_micro_batches(
    encoder: DualEncoder, images: Tensor, texts: Tensor, micro_batch_size: int
) -> tuple[Tensor, Tensor]:
    """Encode like ``encoder(images, texts)``, with the activations of one micro-batch at a time.

    Features and gradients are those of the whole batch, up to the rounding of sums. Dropout and
    patch dropout draw micro-batch by micro-batch; the gradient belongs to the drawn values.

    Args:
        encoder: towers without BatchNorm, see ``refuse_batch_norm``.
        images: (B, 3, H, W), normalised pixels.
        texts: (B, L), token ids.
        micro_batch_size: rows of a tower encoded together, at least 1.

    Returns:
        Image features (B, D) and text features (B, D), L2-normalised.
    """
    return (
        encode_tower_in_micro_batches(encoder.encode_image, images, micro_batch_size),
        encode_tower_in_micro_batches(encoder.encode_text, texts, micro_batch_size),
    )


def encode_tower_in_micro_batches(
    encode: Callable[[Tensor], Tensor], inputs: Tensor, micro_batch_size: int
) -> Tensor:
    """Encode one side; see ``encode_in_micro_batches``.

    Args:
        encode: ``encode_image`` or ``encode_text`` of an encoder.
        inputs: B rows of what it takes.
        micro_batch_size: rows encoded together, at least 1.
    """
    parts = inputs.split(micro_batch_size)
    if len(parts) <= 1 or not torch.is_grad_enabled():
        # A single part would be encoded again for nothing.
        return torch.cat([encode(part) for part in parts])
    return torch.cat(
        [checkpoint(encode, p, use_reentrant=False, preserve_rng_state=True) for p in parts]
    )


def refuse_batch_norm(encoder: nn.Module, micro_batch_size: int) -> None:
    """Refuse towers whose features of one row depend on the other rows of its micro-batch.

    BatchNorm would normalise by the micro-batch, which changes features and gradients, and would
    count each micro-batch twice in its running statistics, once for the second encoding.

    Raises:
        UserError: if micro_batch_size < 1, or a layer is a BatchNorm; names the first.
    """
    if micro_batch_size < 1:
        raise UserError(
            f"micro_batch_size ({micro_batch_size}) must be at least 1, or null for the whole "
            "local batch at once"
        )
    found = [name for name, layer in encoder.named_modules() if isinstance(layer, _BatchNorm)]
    if found:
        raise UserError(
            f"micro_batch_size ({micro_batch_size}) would change what this model computes: it has "
            f"BatchNorm ({found[0]}, {len(found)} in all), whose statistics are those of a whole "
            "batch; set it to null, or choose a model without BatchNorm, such as a ViT"
        )
