"""Runs of a tiny model with a locked tower, live or from features that were written down."""

import warnings

import torch
from lightning.pytorch import Callback, Trainer

from dist_siglip.models.tuning import TowerConfig
from dist_siglip.training.datamodule import ImageTextDataModule
from tests.support.torchrun import pretend_torchrun
from tests.support.tuning_ranks import locked_module


class Watch(Callback):
    """Keeps losses, sample ids, and whether pixels and tokens came along."""

    def __init__(self):
        self.losses, self.ids, self.pixels, self.tokens = [], [], 0, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        self.ids.append(batch.sample_ids.tolist())
        self.pixels += batch.images.numel()
        self.tokens += batch.texts.numel()


def module_of(model, tower="image", **settings):
    """The same random weights every time; one tower locked."""
    return locked_module(model, **{f"{tower}_tower": TowerConfig(locked=True), **settings})


def data_of(shards, module, **options):
    settings = {
        "train_shards": shards,
        "inputs": module.inputs,
        "global_batch_size": 8,
        "workers_per_rank": 0,
        "train_crop_scale": None,
        "max_bad_fraction": 0.5,
    }
    return ImageTextDataModule(**settings | options)


def run(model, shards, folder, tower="image", world_size=1, data=None, **settings):
    """Train four steps; return what was watched and the parameters."""
    module = module_of(model, tower, **settings)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="auto" if world_size == 1 else "ddp",
        max_epochs=-1,
        max_steps=4,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[watch],
    )
    trainer.fit(module, datamodule=data_of(shards, module, **(data or {})))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return {**vars(watch), "state": state, "start": start}


def run_rank(rank, world_size, model, shards, folder, tower, data):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pretend_torchrun(rank, world_size)
    return run(model, shards, folder, tower, world_size, data)
