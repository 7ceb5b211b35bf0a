"""The losses that ``bench loss`` times beside one another, and the matrix products that bound them.

Each contestant is a function (image_features, text_features, logit_scale, logit_bias) -> loss of
this rank; gradients come from ``backward``.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as with_grad
import torch.nn.functional as F
from torch import Tensor

from dist_siglip.distributed import ExchangeName
from dist_siglip.losses import siglip_loss
from dist_siglip.losses.kernels.products import product, uses_onednn

Contestant = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

OPEN_CLIP = "open_clip bidir"


def contestants(
    rank: int, world_size: int, device: torch.device, exchanges: tuple[ExchangeName, ...]
) -> dict[str, Contestant]:
    """Return the losses that can run here, by name; ours first."""
    from open_clip.loss import SigLipLoss

    found: dict[str, Contestant] = {
        f"dist_siglip {name}": partial(siglip_loss, exchange=name) for name in exchanges
    }
    found[OPEN_CLIP] = SigLipLoss(False, rank, world_size, "bidir")
    if world_size > 1:
        found["open_clip gather"] = SigLipLoss(False, rank, world_size, "gather")
    found["plain chunks"] = partial(chunked_loss, rank=rank)
    if device.type == "cuda" and find_spec("siglip_kernel") is not None:
        found["siglip-kernel"] = _siglip_kernel(rank, world_size)
    return found


def chunked_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    rank: int,
    chunk_rows: int = 1024,
) -> Tensor:
    """The sigmoid loss as a plain loop over row chunks, all texts gathered, autograd behind it.

    As open_clip and big_vision cut it; every chunk's logits live until backward.
    """
    texts = (text_features,)
    if dist.is_initialized() and dist.get_world_size() > 1:
        texts = with_grad.all_gather(text_features)
    total = image_features.new_zeros((), dtype=torch.float32)
    for owner, text in enumerate(texts):
        for start in range(0, image_features.shape[0], chunk_rows):
            rows = image_features[start : start + chunk_rows]
            logits = logit_scale * rows @ text.T + logit_bias
            signs = -torch.ones_like(logits)
            if owner == rank:
                signs.diagonal(start).fill_(1)
            total = total - F.logsigmoid(signs * logits).sum()
    return total / image_features.shape[0]


def matmul_limits(
    image_features: Tensor, text_features: Tensor, world_size: int
) -> dict[str, Callable[[], None]]:
    """Return the three products of the loss for every shard and nothing else, by library.

    Shapes (B, D) x (D, B), (B, B) x (B, D) and its transpose, into memory that is there already.
    """
    image, text = image_features.detach(), text_features.detach()
    logits = image.new_zeros(image.shape[0], text.shape[0])
    gradient = torch.zeros_like(image)

    def by_torch() -> None:
        for _ in range(world_size):
            torch.mm(image, text.T, out=logits)
            torch.mm(logits, text, out=gradient)
            torch.mm(logits.T, image, out=gradient)

    def by_onednn() -> None:
        for _ in range(world_size):
            product(image, text)
            product(logits, text.T)
            product(logits.T, image.T)

    found = {"three matmuls": by_torch}
    if uses_onednn(image):
        found["three matmuls, oneDNN"] = by_onednn
    return found


def _siglip_kernel(rank: int, world_size: int) -> Contestant:
    kernel = import_module("siglip_kernel")
    if world_size > 1:
        ring: Contestant = kernel.DistributedSigLIPLoss(
            strategy="ring", rank=rank, world_size=world_size
        )
        return ring

    def one_rank(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        loss: Tensor = kernel.fused_siglip_loss(image, text, scale.log(), bias)
        return loss

    return one_rank
