"""Gradients of NaFlex steps on each rank, training runs, and batches as loaders bring them."""

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_siglip.data import ImageTextBatch
from dist_siglip.losses import LogitScaleBias, siglip_loss
from dist_siglip.models import build_dual_encoder, encode_in_micro_batches
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.naflex import GRIDS, packed_of
from tests.support.sharded_ranks import Losses
from tests.support.torchrun import pretend_torchrun
from tests.support.tuning_ranks import CALM, fit, locked_module

LAYOUTS = {1: (6,), 2: (4, 2), 3: (3, 1, 2)}  # local batch sizes by rank
MICRO_BATCH_SIZES = (None, 2)
LENGTHS = (64, 80, 72)  # of the batches of a run


def batch_of(num_patches=64, seed=0, dtype=torch.float32):
    """Six pairs, a picture of each grid."""
    packed = packed_of(GRIDS, num_patches, seed, dtype)
    texts = torch.randint(1, 40000, (6, 8), generator=torch.Generator().manual_seed(seed))
    texts[:, -1] = 49407
    ids = torch.arange(6)
    return ImageTextBatch(packed, texts, ids, ids, ids >= 0, ids < 0)


def rows_of(batch, rows):
    return ImageTextBatch(*(None if part is None else part[rows] for part in batch))


class Step(nn.Module):
    """Towers, scale, bias and loss, as a training step joins them."""

    def __init__(self, models, micro_batch_size):
        super().__init__()
        self.towers = build_dual_encoder(*models, num_patches=64).encoder.train()
        self.logits = LogitScaleBias(5.0, -2.0)
        self.micro_batch_size = micro_batch_size
        self.double()

    def forward(self, batch):
        size = self.micro_batch_size or len(batch.images)
        features = encode_in_micro_batches(self.towers, batch.images, batch.texts, size)
        return siglip_loss(*features, *self.logits())


def gradients_of(rank, world_size, models):
    """Gradients after DDP's exchange and the loss, for each size of micro-batch."""
    sizes = LAYOUTS[world_size]
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = []
    for micro_batch_size in MICRO_BATCH_SIZES:
        step = Step(models, micro_batch_size)
        wrapped = DistributedDataParallel(step, bucket_cap_mb=0.01) if world_size > 1 else step
        loss = wrapped(rows_of(batch_of(dtype=torch.float64), rows))
        loss.backward()
        if world_size > 1:
            dist.all_reduce(loss.detach_())
        gradients = {name: parameter.grad for name, parameter in step.named_parameters()}
        found.append({"loss": loss.detach() / world_size, **gradients})
    return found


def train(rank, world_size, models, folder, cases):
    """Train each case on batches of several lengths; return losses and whole parameters.

    Args:
        cases: (settings of the module, whether it is sharded).
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found = []
    for settings, is_sharded in cases:
        module = locked_module(models[0], pretrained=models[1], num_patches=64, **settings)
        rows = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
        batches = [rows_of(batch_of(n, seed), rows) for seed, n in enumerate((*LENGTHS, 64, 64))]
        losses = Losses()
        strategy = {"strategy": FullyShardedStrategy()} if is_sharded and world_size > 1 else {}
        fit(
            module,
            folder,
            batches,
            rank,
            world_size,
            callbacks=[losses],
            max_steps=len(LENGTHS),
            gradient_clip_val=1.0,
            **strategy,
        )
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(module, options=whole)
        state = {name: value.clone() for name, value in state.items()}
        found.append({"state": state, "losses": losses.values})
    return found


def start_of(models):
    module = locked_module(models[0], pretrained=models[1], num_patches=64, optim=CALM)
    return {name: value.clone() for name, value in module.state_dict().items()}


def batches_of(rank, world_size, inputs, shards, workers, num_batches, state=None):
    """The first batches of a rank from a state on, and the state behind them."""
    warnings.simplefilter("ignore")
    if world_size > 1:
        pretend_torchrun(rank, world_size)
    data = ImageTextDataModule(
        train_shards=shards,
        inputs=inputs,
        global_batch_size=12,
        workers_per_rank=workers,
        seed=3,
        block_shards=2,
        train_crop_scale=(0.5, 1.0),
        sequence_lengths=[4, 9, 16],
    )
    if state is not None:
        data.load_state_dict(state)
    data.setup("fit")
    found = []
    for batch in data.train_dataloader():
        found.append((batch.sample_ids, batch.images.clone()))
        data.progress.samples_consumed += data.global_batch_size
        if len(found) == num_batches:
            return found, data.state_dict()
    raise AssertionError("the loader has no end")
