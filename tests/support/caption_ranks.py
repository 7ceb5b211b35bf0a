"""Gradients of a step whose pairs have two captions each, on each rank."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_siglip.losses import ClipLoss, LogitScaleBias, MatryoshkaLoss, SigLipLoss, WeightedLoss
from dist_siglip.models import build_dual_encoder, encode_tower_in_micro_batches
from dist_siglip.training.module.captions import loss_of_captions
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support import objective_ranks
from tests.support.tuning_ranks import fit, locked_module

LAYOUTS = {1: (6,), 2: (4, 2), 3: (3, 1, 2)}  # local batch sizes by rank
WEIGHTS = {"alt": 1.0, "long": 3.0}
LOSSES = {
    "sigmoid": lambda: SigLipLoss(duplicates="positive"),
    "softmax": ClipLoss,
    "prefixes": lambda: MatryoshkaLoss([64, 16]),
    "terms": lambda: WeightedLoss(SigLipLoss(), alignment=0.5, cross_uniformity=0.5),
}
CASES = [*((name, None, "") for name in LOSSES), ("sigmoid", 4, "")]
BROKEN = ("no weights", "rows of this rank", "ids of the first field")


def batch_of(num_pairs=6, seed=2, dtype=torch.float64):
    """Pairs with a second caption; of each field two captions are the same, not of one pair."""
    first, other = (objective_ranks.batch_of(num_pairs, each, dtype) for each in (seed, seed + 50))
    ids = torch.arange(num_pairs)
    alt, long = ids.clone(), 100 + ids
    alt[1], long[-1] = alt[0], long[1]
    return first._replace(
        caption_ids=alt, more_texts=other.texts[:, None], more_caption_ids=long[:, None]
    )


rows_of = objective_ranks.rows_of


class Step(nn.Module):
    """Towers, scale and bias and the loss of all captions, as a training step joins them."""

    def __init__(self, model, name, micro_batch_size, broken):
        super().__init__()
        torch.manual_seed(1)
        self.towers = build_dual_encoder(model).encoder.train()
        self.logits = LogitScaleBias(5.0, -2.0)
        self.loss = LOSSES[name]()
        self.micro_batch_size, self.broken = micro_batch_size, broken
        self.double()

    def forward(self, batch):
        size = self.micro_batch_size or 2 * len(batch.images)
        encode = encode_tower_in_micro_batches
        images = encode(self.towers.encode_image, batch.images, size)
        texts = encode(self.towers.encode_text, batch.all_texts(), size)
        scale, bias = self.logits()
        if self.broken == "ids of the first field":
            batch = batch._replace(more_caption_ids=batch.caption_ids[:, None])
        weights = {} if self.broken == "no weights" else WEIGHTS
        loss = loss_of_captions(
            self.loss, images, texts, scale, bias, batch=batch, weights=weights, nonfinite="raise"
        ).loss
        if self.broken == "rows of this rank":
            ranks = dist.get_world_size()
            return loss * sum(LAYOUTS[ranks]) / (ranks * len(batch.images))
        # Not every loss uses the bias.
        return loss + 0 * bias.sum()


def gradients_of(rank, world_size, model, cases):
    """Gradients after DDP's exchange and the loss, for each (loss, micro-batch size, broken)."""
    sizes = LAYOUTS[world_size]
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = []
    for case in cases:
        step = Step(model, *case)
        wrapped = DistributedDataParallel(step, bucket_cap_mb=0.01) if world_size > 1 else step
        loss = wrapped(rows_of(batch_of(sum(sizes)), rows))
        loss.backward()
        if world_size > 1:
            dist.all_reduce(loss.detach_())
        gradients = {name: parameter.grad for name, parameter in step.named_parameters()}
        found.append({"loss": loss.detach() / world_size, **gradients})
    return found


def sharded_and_not(rank, world_size, model, folder):
    """Parameters after two steps under DDP and under FSDP2, whose micro-batches encode again."""
    found = []
    for strategy in ("ddp", FullyShardedStrategy()):
        module = locked_module(model, micro_batch_size=1)
        module.caption_weights = WEIGHTS
        half = slice(2 * rank, 2 * rank + 2)
        batches = [rows_of(batch_of(4, seed, torch.float32), half) for seed in range(10)]
        fit(module, folder, batches, rank, world_size, strategy=strategy, max_steps=2)
        whole = {}
        for name, value in module.state_dict().items():
            whole[name] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        found.append(whole)
    return found
