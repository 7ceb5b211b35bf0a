"""Training runs by distillation from live teachers, on any number of ranks."""

import copy
import warnings

import torch
from lightning.pytorch import Callback
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dist_siglip.data import ImageTextBatch
from dist_siglip.losses import DistillationLoss
from dist_siglip.training.module.teachers import TeacherConfig
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.tiny_models import ARCHITECTURES, network_of, write_config
from tests.support.tuning_ranks import GLOBAL_BATCH, fit, locked_module

# Another size, another number of tokens, another width than the student's.
LARGER = copy.deepcopy(ARCHITECTURES["siglip"])
LARGER["vision_cfg"]["image_size"] = 48
LARGER["text_cfg"]["context_length"] = 6


def write_teacher(folder, name, architecture, logits=(20.0, -12.0)):
    """Random weights with scale and bias; the settings of a teacher of them."""
    torch.manual_seed(len(name))
    state = network_of(architecture).state_dict()
    scale, bias = logits
    for key, value in (("logit_scale", scale), ("logit_bias", bias)):
        state.pop(key, None)
        if value is not None:
            value = torch.tensor(value)
            state[key] = value.log() if key == "logit_scale" else value
    torch.save(state, folder / f"{name}.pt")
    model = write_config(folder / f"{name}.json", architecture)
    return {"model": model, "pretrained": str(folder / f"{name}.pt")}


def batches_of(num_batches, rank=0, world_size=1):
    """A rank's rows of global batches of bytes, with tokens for a teacher of six."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(num_batches):
        images = torch.randint(256, (GLOBAL_BATCH, 3, 32, 32), generator=generator).byte()
        texts = torch.randint(1, 40000, (GLOBAL_BATCH, 8), generator=generator)
        texts[:, -1] = 49407
        ids = torch.arange(GLOBAL_BATCH)
        batch = ImageTextBatch(
            images, texts, ids, ids, ids >= 0, ids < 0, teacher_texts=texts[:, 2:].clone()
        )
        rows = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
        found.append(ImageTextBatch(*(None if part is None else part[rows] for part in batch)))
    return found


class Watch(Callback):
    """Keeps what is logged of each step."""

    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, *_):
        metrics = trainer.callback_metrics.items()
        self.logged.append({name: value.item() for name, value in metrics})


def train(model, folder, teachers, case, rank=0, world_size=1):
    """Train a case; return the module, its whole parameters, the log, and the trainer.

    Args:
        case: "module" (settings of the module), "loss" (of DistillationLoss), "trainer" (of the
            Trainer), "sharded", "steps", "start" (a checkpoint) and "done" (steps behind it).
    """
    warnings.simplefilter("ignore")
    module = locked_module(
        model,
        loss=DistillationLoss(**case.get("loss", {})),
        teachers=[TeacherConfig(**each) for each in teachers],
        **case.get("module", {}),
    )
    settings = {"max_steps": case.get("steps", 3), **case.get("trainer", {})}
    if case.get("sharded") and world_size > 1:
        settings["strategy"] = FullyShardedStrategy()
    watch = Watch()
    batches = batches_of(8, rank, world_size)[case.get("done", 0) :]
    callbacks = [watch, *settings.pop("callbacks", [])]
    trainer = fit(
        module,
        folder,
        batches,
        rank,
        world_size,
        case.get("start"),
        callbacks=callbacks,
        **settings,
    )
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {
        name: value.clone() for name, value in get_model_state_dict(module, options=whole).items()
    }
    return module, state, watch.logged, trainer


def train_rank(rank, world_size, model, folder, teachers, cases):
    """Parameters and log of each case."""
    return [train(model, folder, teachers, case, rank, world_size)[1:3] for case in cases]
