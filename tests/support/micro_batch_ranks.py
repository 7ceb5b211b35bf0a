"""Gradients of a training step under DDP, with and without micro-batches, on each rank."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_siglip.losses import LogitScaleBias, siglip_loss
from dist_siglip.models import DualEncoder, encode_in_micro_batches
from tests.support.tiny_models import TEXT, VIT, network_of

LAYOUTS = {1: (6,), 2: (4, 2), 3: (3, 1, 2)}  # local batch sizes by rank
MICRO_BATCH_SIZES = (1, 2, 4)
SMALL = {
    "embed_dim": 8,
    "vision_cfg": {**VIT, "layers": 2},
    "text_cfg": {**TEXT, "vocab_size": 50, "layers": 2},
}


class Step(nn.Module):
    """Towers, scale, bias and loss, as a training step joins them."""

    def __init__(self, micro_batch_size):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = DualEncoder(network_of(SMALL)).train()
        self.logits = LogitScaleBias(5.0, -2.0)
        self.micro_batch_size = micro_batch_size
        self.double()

    def forward(self, images, texts):
        if self.micro_batch_size is None:
            features = self.encoder(images, texts)
        else:
            features = encode_in_micro_batches(self.encoder, images, texts, self.micro_batch_size)
        return siglip_loss(*features, *self.logits())


def make_inputs(num_pairs):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(num_pairs, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.randint(1, 50, (num_pairs, 8), generator=generator)


def gradients(step):
    return {name: parameter.grad for name, parameter in step.named_parameters()}


def ddp_gradients(rank, world_size):
    """Gradients after DDP's exchange, for each size of micro-batch and for none."""
    sizes = LAYOUTS[world_size]
    images, texts = make_inputs(sum(sizes))
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = {}
    for micro_batch_size in (None, *MICRO_BATCH_SIZES):
        step = Step(micro_batch_size)
        # Many small buckets: each must wait for the last micro-batch.
        wrapped = DistributedDataParallel(step, bucket_cap_mb=0.01) if world_size > 1 else step
        loss = wrapped(images[rows], texts[rows])
        loss.backward()
        if world_size > 1:
            dist.all_reduce(loss.detach_())
        found[micro_batch_size] = {"loss": loss.detach() / world_size, **gradients(step)}
    return found
