"""Gradients of a step with an objective, on each rank, and training runs with one."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_siglip.data import ImageTextBatch
from dist_siglip.losses import LogitScaleBias, SigLipLoss
from dist_siglip.models import build_dual_encoder, encode_tower_in_micro_batches
from dist_siglip.objectives import Captioning, Term
from dist_siglip.training.module.encoding import encode_with_terms
from dist_siglip.training.module.objectives import (
    build_objectives,
    weigh_terms,
)
from dist_siglip.training.module.placement import shard_module
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.tuning_ranks import fit, locked_module

LAYOUTS = {1: (6,), 2: (4, 2), 3: (3, 1, 2)}  # local batch sizes by rank
MICRO_BATCH_SIZES = (None, 2)
WEIGHT = 0.7
TASKS = ("caption", "referring", "grounded")


def batch_of(num_pairs=6, seed=2, dtype=torch.float64):
    """Pairs whose captions have different lengths, with draws of their own.

    The first half has regions: in no layout do ranks have as many, and the last rank has none.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_pairs, 3, 32, 32, generator=generator, dtype=dtype)
    texts = torch.randint(1, 40000, (num_pairs, 8), generator=generator)
    texts[:, 0] = 49406
    for row in range(num_pairs):
        end = 1 + (5 * row + 2) % 7
        texts[row, end], texts[row, end + 1 :] = 49407, 0
    ids = torch.arange(num_pairs)
    draws = torch.randint(2**62, (num_pairs,), generator=generator)
    yes, no = torch.ones(num_pairs).bool(), torch.zeros(num_pairs).bool()
    corners = 0.4 * torch.rand(num_pairs, 2, generator=generator)
    boxes = torch.cat([corners, corners + 0.5], dim=1) * (ids < (num_pairs + 1) // 2)[:, None]
    return ImageTextBatch(
        images,
        texts,
        ids,
        ids,
        yes,
        no,
        picture_ids=ids,
        draws=draws,
        region_texts=texts.roll(1, dims=0),
        region_boxes=boxes,
    )


def rows_of(batch, rows):
    """Some rows of a batch."""
    return ImageTextBatch(*(None if part is None else part[rows] for part in batch))


class Step(nn.Module):
    """Towers, scale and bias, loss and objective, as a training step joins them."""

    def __init__(self, model, micro_batch_size, world_size, variant):
        super().__init__()
        torch.manual_seed(1)
        built = build_dual_encoder(model)
        self.towers = built.encoder.train()
        tasks = {"tasks": TASKS, "box_bins": 20} if "regions" in variant else {}
        self.objectives = build_objectives([Captioning(WEIGHT, parallel=0.5, **tasks)], built)
        for parameter in self.objectives.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.logits, self.loss = LogitScaleBias(5.0, -2.0), SigLipLoss()
        self.micro_batch_size, self.world_size = micro_batch_size, world_size
        self.variant = variant
        self.double()

    def forward(self, batch):
        size = self.micro_batch_size or len(batch.images)
        images, terms = encode_with_terms(self.towers, self.objectives, batch, 0, size)
        texts = encode_tower_in_micro_batches(self.towers.encode_text, batch.texts, size)
        loss = self.loss(images, texts, *self.logits())
        if self.variant == "mean of this rank":
            term = terms["captioning"]["caption_loss"]
            return loss + WEIGHT * term.total / term.number
        share, logged = weigh_terms(terms, {"captioning": WEIGHT}, self.world_size)
        self.logged = torch.stack([logged[f"train/{term}"] for term in terms["captioning"]])
        return loss + share


def on_ranks(step, world_size, *, in_shards):
    """A step as several ranks call it: sharded in place, or in DDP; of one rank itself."""
    if in_shards:
        shard_module(step, init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",)))
        return step
    return DistributedDataParallel(step, bucket_cap_mb=0.01) if world_size > 1 else step


def gradients_of(rank, world_size, model, cases):
    """Gradients after the exchange of ranks and the loss, for each case.

    A case is a size of micro-batches, and "" for DDP, "shards" for FSDP2, with "regions" for all
    tasks of the decoder, or a broken variant.
    """
    sizes = LAYOUTS[world_size]
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = []
    for micro_batch_size, variant in cases:
        step = Step(model, micro_batch_size, world_size, variant)
        wrapped = on_ranks(step, world_size, in_shards="shards" in variant)
        loss = wrapped(rows_of(batch_of(sum(sizes)), rows))
        loss.backward()
        if world_size > 1:
            dist.all_reduce(loss.detach_())
        found.append(
            {
                "loss": loss.detach() / world_size,
                "logged": getattr(step, "logged", torch.zeros(())),
                **{name: _whole(parameter.grad) for name, parameter in step.named_parameters()},
            }
        )
    return found


def evaluated(rank, world_size, model, folder, shardings):
    """What an evaluation after two steps measures and writes; a sharding of None is DDP."""
    found = []
    rows = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    batches, val = (
        [rows_of(batch_of(4, seed, torch.float32), rows) for seed in seeds]
        for seeds in (range(9), (20, 21))
    )
    # Ids of the whole evaluation; the last picture of it stands in for none.
    val[1] = val[1]._replace(sample_ids=val[1].sample_ids + 4)
    if rank == world_size - 1:
        val[1].valid[-1] = False
    for sharding in shardings:
        module = locked_module(model, objectives=[Captioning(layers=1, tasks=TASKS)])
        nn.init.normal_(module.by_name["captioning"].output.weight, std=0.3)  # else nothing to say
        module.available_pairs = lambda: {"available_pairs": 7.0}
        settings = {} if sharding is None else {"strategy": FullyShardedStrategy(**sharding)}
        trainer = fit(
            module,
            folder,
            batches,
            rank,
            world_size,
            val_batches=val,
            max_steps=2,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            **settings,
        )
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        found.append((metrics, module.written))
    return found


def _whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def weighed(rank, world_size):
    """The shares of the published case: a rank each holds the tokens of one caption."""
    total, number = ((0.340753 + 0.743668, 2), (0.743668 + 1.386294 + 0.139206, 3))[rank]
    terms = {"given": {"loss": Term(torch.tensor(total), torch.tensor(number))}}
    share, logged = weigh_terms(terms, {"given": 1.0}, world_size)
    return share.item(), logged["train/loss"].item()
