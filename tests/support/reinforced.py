"""Shards as of DataCompDR, of deliberately small rows that say where they are from."""

import io
import json
import warnings

import numpy as np
from lightning.pytorch import Trainer

from dist_siglip.data.samples.datacompdr import DataCompDR
from dist_siglip.losses import DistillationLoss
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module.teachers import TeacherConfig
from tests.support.shards import caption, encode, picture, write_shard
from tests.support.torchrun import pretend_torchrun
from tests.support.tuning_ranks import locked_module

DIMS = (3, 2)
SIDE = 20  # of the pictures
NUM_AUGMENTATIONS, NUM_SYNTHETIC = 4, 2


def row(sample_id, kind, number, dims=DIMS):
    """A row of both teachers, L2-normalised by teacher: another for each picture and text."""
    draw = np.random.default_rng([sample_id, "image text".find(kind), number])
    parts = np.split(draw.normal(size=sum(dims)), [dims[0]])
    return np.concatenate([part / np.linalg.norm(part) for part in parts]).astype(np.float32)


def augmentation(sample_id, number):
    """A crop, and operations that differ from sample to sample."""
    draw = np.random.default_rng([sample_id, number])
    rows, columns = (int(each) for each in draw.integers(8, SIDE + 1, 2))
    top, left = int(draw.integers(0, SIDE - rows + 1)), int(draw.integers(0, SIDE - columns + 1))
    return [[top, left, rows, columns], [[int(draw.integers(6, 10)), 0.3], [5, -9.0]]]


def synthetic(sample_id, number):
    return f"synthetic {number} of {sample_id}"


def npz(image, text, **options):
    buffer = io.BytesIO()
    save = np.savez_compressed if options.get("compressed") else np.savez
    save(buffer, image_emb=image, text_emb=text)
    return buffer.getvalue()


def members(sample_id, dims=DIMS, **changed):
    """Members of one sample; ``changed`` replaces arrays, lists or, by extension, whole members."""
    image = [row(sample_id, "image", number, dims) for number in range(NUM_AUGMENTATIONS)]
    text = [row(sample_id, "text", number, dims) for number in range(1 + NUM_SYNTHETIC)]
    listed = [augmentation(sample_id, number) for number in range(NUM_AUGMENTATIONS)]
    texts = [synthetic(sample_id, number) for number in range(NUM_SYNTHETIC)]
    found = {
        "png": encode(picture(sample_id, SIDE)),
        "txt": caption(sample_id).encode(),
        "url.txt": b"https://example.com/a.png",
        "json": json.dumps({"uid": f"{sample_id:032x}"}).encode(),
        "syn.json": json.dumps({"syn_text": changed.pop("syn_text", texts)}).encode(),
        "paug.json": json.dumps(
            {"param_aug": json.dumps(changed.pop("param_aug", listed))}
        ).encode(),
        "npz": npz(changed.pop("image_emb", np.stack(image)), changed.pop("text_emb", text)),
    }
    found |= {kind.replace("_", "."): data for kind, data in changed.items()}
    return {kind: data for kind, data in found.items() if data is not None}


def write_reinforced(folder, counts=(7, 5), bad=None, dims=DIMS):
    """Write shards; ``bad`` has changes by sample id."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for number, count in enumerate(counts):
        ids = range(first, first + count)
        samples = [(f"{i:06d}", members(i, dims, **(bad or {}).get(i, {}))) for i in ids]
        paths.append(str(write_shard(folder / f"{number:05d}.tar", samples)))
        first += count
    return paths


SCALES = (20.0, 30.0)


def student_of(model, **settings):
    """A module that learns from the rows of the shards alone."""
    settings = {"teachers": [TeacherConfig(scale=scale) for scale in SCALES]} | settings
    return locked_module(model, loss=DistillationLoss(share=1.0, form="softmax"), **settings)


def reinforced_data(shards, module, **options):
    settings = {
        "train_shards": shards,
        "inputs": module.inputs,
        "datacompdr": DataCompDR(dims=DIMS, picture_size=SIDE, synthetic="beside"),
        "train_crop_scale": None,
        "global_batch_size": 4,
        "workers_per_rank": 0,
    }
    return ImageTextDataModule(**settings | options)


def train(model, shards, folder, rank=0, world_size=1):
    """Train three steps; return the parameters."""
    warnings.simplefilter("ignore")
    if world_size > 1:
        pretend_torchrun(rank, world_size)
    module = student_of(model)
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="auto" if world_size == 1 else "ddp",
        max_epochs=-1,
        max_steps=3,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=reinforced_data(shards, module))
    return {name: value.clone() for name, value in module.state_dict().items()}


def train_rank(rank, world_size, model, shards, folder):
    return train(model, shards, folder, rank, world_size)
