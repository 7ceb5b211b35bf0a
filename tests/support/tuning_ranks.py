"""Small training runs of the whole module on batches that are the same for any world size."""

import os
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision

from dist_siglip.data import ImageTextBatch
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.tuning import TowerConfig
from dist_siglip.training.callbacks import AtomicCheckpointIO
from dist_siglip.training.module import SigLipModule
from dist_siglip.training.optim import OptimConfig
from tests.support.tiny_models import ARCHITECTURES, inputs_of
from tests.support.torchrun import pretend_torchrun

GLOBAL_BATCH = 4
# A large epsilon keeps Adam from blowing rounding differences up to whole steps.
CALM = OptimConfig(learning_rate=0.01, epsilon=0.01, schedule="constant")


def locked_module(model, **settings):
    """A module with the same random weights in every process, of a file where a tower is locked."""
    seed_everything(5, verbose=False)
    if any(isinstance(value, TowerConfig) and value.is_locked for value in settings.values()):
        settings.setdefault("pretrained", weights_beside(model))
    return SigLipModule(model, **{"optim": CALM, **settings})


def weights_beside(model):
    """Write random weights of a model config beside it, once, and return their path."""
    path = Path(model).with_suffix(".weights.pt")
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(5)
            state = build_dual_encoder(model).encoder.clip.state_dict()
        own = path.with_suffix(f".{os.getpid()}")  # another rank may be at it
        torch.save(state, own)
        own.rename(path)
    return str(path)


def batches_of(num_batches, rank=0, world_size=1, kind="siglip"):
    """A rank's rows of global batches of random pixels and tokens."""
    torch.manual_seed(11)
    found = []
    for _ in range(num_batches):
        images, texts = inputs_of(ARCHITECTURES[kind], GLOBAL_BATCH)
        ids = torch.arange(GLOBAL_BATCH)
        yes, no = torch.ones(GLOBAL_BATCH).bool(), torch.zeros(GLOBAL_BATCH).bool()
        rows = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
        found.append(ImageTextBatch(*(part[rows] for part in (images, texts, ids, ids, yes, no))))
    return found


def fit(
    module, folder, batches, rank=0, world_size=1, ckpt_path=None, val_batches=None, **settings
):
    """Train on the batches, one step each; return the trainer."""
    if world_size > 1:
        warnings.simplefilter("ignore")
        pretend_torchrun(rank, world_size)
        settings.setdefault("strategy", "ddp")
    plugins = [AtomicCheckpointIO()]
    if settings.get("precision") == "16-mixed" and settings.get("accelerator", "cpu") == "cpu":
        # The Trainer refuses it on a CPU, where torch can do it. A scale of 65,536 would overflow
        # at the first step, which is then skipped.
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        plugins.append(MixedPrecision(settings.pop("precision"), "cpu", scaler))
    trainer = Trainer(
        accelerator=settings.pop("accelerator", "cpu"),
        devices=world_size,
        logger=settings.pop("logger", False),
        enable_checkpointing=settings.pop("enable_checkpointing", False),
        plugins=plugins,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **{"max_steps": len(batches), "log_every_n_steps": 1, **settings},
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    val_loader = val_batches and torch.utils.data.DataLoader(val_batches, batch_size=None)
    trainer.fit(module, loader, val_loader, ckpt_path=ckpt_path)
    return trainer
