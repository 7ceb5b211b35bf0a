"""Each recipe of configs/ runs: its settings, a tiny model of the same kind, two steps."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dist_siglip.data.handwriting import write_handwriting_shards
from dist_siglip.runs import RunFolder
from tests.support.forked_runs import run_forked
from tests.support.reinforced import write_reinforced
from tests.support.shards import encode, picture, write_shard
from tests.support.tiny_models import ARCHITECTURES, network_of, write_config

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = [*sorted(FOLDER.glob("*.yaml")), FOLDER / "siglip2/b16_curated.yaml"]
pytestmark = pytest.mark.e2e
SYNTHETIC = (b'{"synthetic": ["a brown hen", "a bird in grass"]}', b'{"synthetic": "a hen"}', b"{}")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Shards, a model as JSON, and weights of it."""
    folder = tmp_path_factory.mktemp("parts")
    shards = write_handwriting_shards(
        folder / "data",
        num_train_pairs=40,
        num_val_pairs=16,
        num_train_shards=2,
        image_size=32,
        regions=True,
    )
    # Weights whose pairs are a little more alike than its other pictures and captions, so that some
    # scale fits.
    torch.manual_seed(1)
    weights = {
        name: value
        for name, value in network_of(ARCHITECTURES["siglip"]).state_dict().items()
        if name not in ("logit_scale", "logit_bias")
    }
    save_file(weights, folder / "weights.safetensors")
    write_config(folder / "tiny.json", ARCHITECTURES["siglip"])
    for name in ("first", "second"):  # every third sample lacks the second field
        members = [
            (f"{name}{i}", {"png": encode(picture(i)), "txt": b"a hen", "json": SYNTHETIC[i % 3]})
            for i in range(20)
        ]
        write_shard(folder / f"{name}.tar", members)
    write_reinforced(folder / "reinforced", (10, 10), dims=(768, 768))
    return SimpleNamespace(folder=folder, train=shards.train, val=shards.val)


def shrunk(recipe, parts, folder):
    """Settings that make a recipe small; everything else stays as the file says."""
    model, trainer = recipe["model"], recipe["trainer"]
    found = {
        "run_dir": folder / "run",
        "model.model": parts.folder / "tiny.json",
        "model.optim.warmup_steps": 1,
        "data.train_shards": parts.folder if "captions" in recipe["data"] else parts.train,
        "data.val_shards": parts.val,
        "data.global_batch_size": 8,
        "data.val_local_batch_size": 8,
        "data.workers_per_rank": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2 if "strategy" in trainer else 1,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "checkpoint.every_steps": 2,
        "collapse_alarm.action": "warn",
    }
    for name, value in (("micro_batch_size", 4), ("calibration_pairs", 16)):
        if name in model:
            found[f"model.{name}"] = value
    if "pretrained" in model:
        found["model.pretrained"] = parts.folder / "weights.safetensors"
    if any("model" in teacher for teacher in model.get("teachers", [])):
        teacher = {"model": parts.folder / "tiny.json", "scale": 30.0}
        teacher["pretrained"] = parts.folder / "weights.safetensors"
        if "curation" in model:
            teacher["bias"] = -15.0
            found["model.curation.chunks"] = 2
        found["model.teachers"] = json.dumps([teacher] * len(model["teachers"]), default=str)
    if "cooldown_steps" in model.get("optim", {}):
        found["model.optim.cooldown_steps"] = 1
    if recipe["data"].get("datacompdr"):
        found["data.train_shards"] = parts.folder / "reinforced"
    if recipe["data"].get("train_features"):
        found["data.train_features"] = folder / "features"
    return [word for name, value in found.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_trains_two_steps_and_evaluates(path, parts, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    if recipe["data"].get("train_features"):
        command = ["embed", parts.train, "--out", tmp_path / "features"]
        command += ["--format", "features", "--towers", "image", "--dtype", "float32"]
        command += ["--model", parts.folder / "tiny.json", "--workers", 0]
        command += ["--pretrained", parts.folder / "weights.safetensors"]
        done = run_forked(*command)
        assert done.returncode == 0, done.stderr
    done = run_forked(
        "fit",
        "--config",
        path,
        *shrunk(recipe, parts, tmp_path),
        world_size=2 if "strategy" in recipe["trainer"] else 1,
    )
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "run")
    assert run.steps_with_checkpoint() == [2]
    lines = list(map(json.loads, run.metrics.read_text().splitlines()))
    evaluated = [line["step"] for line in lines if "val/loss" in line]
    # A recipe with weights is evaluated before its first step.
    assert evaluated == ([0, 2] if "pretrained" in recipe["model"] else [2])
    assert run.report.stat().st_size > 0
