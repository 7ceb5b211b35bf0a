"""Training runs that join what was written apart: curation, captions, negatives, NaFlex, heads."""

import warnings

import torch
from torch.nn.functional import normalize

from dist_siglip.data import ImageTextBatch
from dist_siglip.losses import DistillationLoss, SigLipLoss
from dist_siglip.models.tuning import LoraSettings, TowerConfig
from dist_siglip.objectives import Captioning
from dist_siglip.training.module.curation import CurationConfig
from dist_siglip.training.module.teachers import TeacherConfig
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.naflex import GRIDS, packed_of
from tests.support.objective_ranks import TASKS
from tests.support.objective_ranks import batch_of as pairs_of
from tests.support.self_distillation_ranks import objectives_of, views_of
from tests.support.sharded_ranks import Losses
from tests.support.tuning_ranks import fit, locked_module

LOADED, STEPS, CAPTIONS, NEGATIVES, TEACHER_DIM = 12, 3, 2, 2, 6
LENGTHS = (64, 80, 72)  # patches of the pictures of each step
HALF = CurationConfig(filter_ratio=0.5, chunks=3)


def heads():
    return [Captioning(layers=1, tasks=TASKS, box_bins=20, parallel=0.5)]


CASES = {
    "curation, captions, negatives, regions, micro-batches": {
        "fields": ("captions", "negatives"),
        "settings": lambda: {
            "loss": SigLipLoss(duplicates="positive"),
            "objectives": heads(),
            "curation": HALF,
            "micro_batch_size": 2,
        },
    },
    "curation, self-distillation, masked prediction, micro-batches, shards": {
        "fields": ("views",),
        "settings": lambda: {
            "objectives": objectives_of(),
            "curation": HALF,
            "micro_batch_size": 1,
        },
        "sharded": True,
    },
    "curation, distillation, self-distillation": {
        "fields": ("views",),
        "settings": lambda: {
            "loss": DistillationLoss(),
            "objectives": objectives_of(),
            "curation": CurationConfig(filter_ratio=0.5, chunks=1),
        },
    },
    "NaFlex, curation, captions, negatives, regions, budget of patches": {
        "fields": ("patches", "captions", "negatives"),
        "settings": lambda: {
            "objectives": heads(),
            "curation": HALF,
            "micro_batch_patches": 160,
        },
    },
    "the same in shards, with checkpointed blocks": {
        "fields": ("patches", "captions", "negatives"),
        "settings": lambda: {
            "objectives": heads(),
            "curation": HALF,
            "micro_batch_patches": 160,
            "gradient_checkpointing": True,
        },
        "sharded": True,
    },
    "NaFlex, distillation, adapters, checkpointed blocks": {
        "fields": ("patches",),
        "settings": lambda: {
            "loss": DistillationLoss(),
            "gradient_checkpointing": True,
            "image_tower": TowerConfig(lora=LoraSettings(rank=2)),
        },
    },
}


def batches_of(fields, rank=0, world_size=1):
    """A rank's rows of large batches with all that is asked for."""
    found = []
    for step, length in enumerate(LENGTHS):
        generator = torch.Generator().manual_seed(step)
        batch = pairs_of(LOADED, seed=step, dtype=torch.float32)

        def texts(count, generator=generator):
            rows = torch.randint(1, 40000, (LOADED, count, 8), generator=generator)
            rows[:, :, -1] = 49407
            return rows

        def unit(width, generator=generator):
            return normalize(torch.randn(LOADED, width, generator=generator), dim=1)

        batch = batch._replace(
            sample_ids=100 * step + batch.sample_ids,
            teacher_image_features=unit(TEACHER_DIM),
            teacher_text_features=unit(TEACHER_DIM),
        )
        if "patches" in fields:
            batch = batch._replace(images=packed_of(GRIDS * 2, length, seed=step))
        if "views" in fields:
            batch = views_of(batch, seed=step)
        if "captions" in fields:
            again = [unit(TEACHER_DIM) for _ in range(CAPTIONS - 1)]
            batch = batch._replace(
                more_texts=texts(CAPTIONS - 1),
                more_caption_ids=50 + batch.caption_ids[:, None],
                teacher_text_features=torch.cat([batch.teacher_text_features, *again], dim=1),
            )
        if "negatives" in fields:
            exist = torch.rand(LOADED, NEGATIVES, generator=generator) < 0.7
            batch = batch._replace(negative_texts=texts(NEGATIVES), negatives_exist=exist)
        rows = slice(rank * LOADED // world_size, (rank + 1) * LOADED // world_size)
        found.append(ImageTextBatch(*(None if part is None else part[rows] for part in batch)))
    return found


def module_of(models, case):
    """The module of a case: of a NaFlex tower, or of one that sees one size."""
    (fixed, weights), other = models
    is_flexible = "patches" in case["fields"]
    model = {"model": fixed, "pretrained": weights, "num_patches": 64}
    settings = case["settings"]()
    return locked_module(
        **(model if is_flexible else {"model": other}),
        **{"loss": SigLipLoss(), "global_batch_size": LOADED, **settings},
        teachers=[TeacherConfig(dim=TEACHER_DIM, scale=8.0, bias=-5.0)]
        if "curation" in settings or isinstance(settings.get("loss"), DistillationLoss)
        else None,
    )


def train(rank, world_size, models, folder, names):
    """Train each case; return whole parameters, losses, and the sample ids of each step."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    warnings.simplefilter("ignore")
    found = []
    for name in names:
        case = CASES[name]
        module, losses, seen = module_of(models, case), Losses(), []

        def noting(batch, *args, finish=module.finish_step, seen=seen, **kwargs):
            seen.append(batch.sample_ids.tolist())
            return finish(batch, *args, **kwargs)

        module.finish_step = noting
        is_sharded = case.get("sharded") and world_size > 1
        options = {"strategy": FullyShardedStrategy()} if is_sharded else {}
        batches = batches_of(case["fields"], rank, world_size)
        options |= {"callbacks": [losses], "gradient_clip_val": 1.0}
        fit(module, folder, batches, rank, world_size, **options)
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(module, options=whole)
        found.append(({k: v.clone() for k, v in state.items()}, losses.values, seen))
    return found
