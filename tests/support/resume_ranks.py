"""What one rank of the resume matrix does: train to a step under Lightning, keep every batch."""

import multiprocessing
import random
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer

from dist_siglip.training.datamodule import ImageTextDataModule
from tests.support.shards import tiny_inputs
from tests.support.torchrun import pretend_torchrun


class Recorder(LightningModule):
    """Trains one number and writes down every batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.sample_ids, batch.images.clone(), batch.texts))
        return (self.weight - batch.images.float().mean()).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def shout_at_random(samples):
    """A stage that draws: leaves some samples out, and changes the text of others."""
    for sample in samples:
        luck = random.random()
        if luck > 0.1:
            yield {**sample, "text": sample["text"].upper() if luck > 0.5 else sample["text"]}


def train_to(rank, world_size, step, workers, settings, folder, checkpoint):
    """Train every named data module to a step; return this rank's batches of each."""
    warnings.simplefilter("ignore")  # of Lightning, about few workers and odd devices
    pretend_torchrun(rank, world_size)
    # A spawned process would spawn its loader processes, too, at three seconds each.
    multiprocessing.set_start_method("fork", force=True)
    return {
        name: _train(name, options, world_size, step, workers, Path(folder), checkpoint)
        for name, options in settings.items()
    }


def _train(name, options, world_size, step, workers, folder, checkpoint):
    data = ImageTextDataModule(
        inputs=tiny_inputs(),
        global_batch_size=8,
        workers_per_rank=workers,
        seed=3,
        block_shards=2,
        train_crop_scale=(0.3, 1.0),
        **options,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp",
        max_epochs=-1,
        max_steps=step,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Recorder()
    restored = None if checkpoint is None else folder / f"{name}-{checkpoint}.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=restored, weights_only=True)
    trainer.save_checkpoint(folder / f"{name}-{step}.ckpt")
    assert trainer.world_size == world_size
    return module.seen
