"""The stages of configs/siglip2: one schedule in three runs, in small, as the files say."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dist_siglip.data.handwriting import write_handwriting_shards
from dist_siglip.runs import RunFolder
from tests.project.test_recipes import shrunk
from tests.support.forked_runs import run_forked
from tests.support.hugging_face import write_folder
from tests.support.tiny_models import ARCHITECTURES, write_config

FOLDER = Path(__file__).parents[2] / "configs/siglip2"
POSITIONS = {
    "b16": "towers.clip.visual.trunk.pos_embed",
    "quickstart": "towers.clip.visual.positional_embedding",
}
ENDS = (8, 9, 10)  # steps at which the runs end, the last one with the schedule
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    shards = write_handwriting_shards(
        folder / "data",
        num_train_pairs=200,
        num_val_pairs=16,
        num_train_shards=2,
        image_size=96,
        regions=True,
    )
    write_config(folder / "tiny.json", ARCHITECTURES["siglip"])
    return SimpleNamespace(folder=folder, train=shards.train, val=shards.val)


def files(name, stage):
    """What a stage is read from, in order, as the heads of the files say."""
    first = "quickstart" if name == "quickstart" else f"{name}_1"
    return [FOLDER / f"{each}.yaml" for each in (first, f"{name}_2", f"{name}_3")[:stage]]


def merged(paths):
    def update(old, new):
        for key, value in new.items():
            both = isinstance(value, dict) and isinstance(old.get(key), dict)
            old[key] = update(old[key], value) if both else value
        return old

    found: dict = {}
    for path in paths:
        update(found, yaml.safe_load(path.read_text()))
    return found


def shrunk_heads(path, folder):
    """A file whose objectives have few prototypes, and views of a small picture."""
    recipe = yaml.safe_load(path.read_text())
    for each in recipe.get("model", {}).get("objectives", []):
        name = each["class_path"].rpartition(".")[2]
        if name in ("SelfDistillation", "MaskedPrediction"):
            each["init_args"] |= {"prototypes": 16, "hidden": 16, "bottleneck": 8}
        if name == "SelfDistillation":
            each["init_args"] |= {"local_size": 16, "local_views": 2}
    folder.mkdir(exist_ok=True)
    small = folder / path.name
    small.write_text(yaml.safe_dump(recipe))
    return small


def fit(paths, *options):
    words = [word for path in paths for word in ("--config", path)]
    done = run_forked("fit", *words, *options)
    assert done.returncode == 0, done.stderr
    return done.stderr


def lines_of(run):
    return list(map(json.loads, run.metrics.read_text().splitlines()))


@pytest.mark.parametrize("name", ["b16", "quickstart"])
def test_stages_share_one_schedule_and_go_on_from_each_other(name, parts, tmp_path):
    recipes = [merged(files(name, stage)) for stage in (1, 2, 3)]
    total = recipes[0]["model"]["optim"]["schedule_steps"]
    shares = [recipe["trainer"]["max_steps"] / total for recipe in recipes]
    assert shares == pytest.approx([0.8, 0.95, 1.0], abs=1e-6)
    assert "from_run" not in recipes[0]
    for before, after in pairwise(recipes):
        assert after["from_run"] == before["run_dir"]
    sizes = (32, 32, 64) if name == "b16" else (64, 64, 96)
    rates = []
    for stage, (recipe, end, size) in enumerate(zip(recipes, ENDS, sizes, strict=True), 1):
        folder = tmp_path / str(stage)
        options = shrunk(recipe, parts, folder)
        options += ["--trainer.max_steps", end, "--model.optim.schedule_steps", ENDS[-1]]
        options += ["--trainer.precision", "32-true", "--trainer.log_every_n_steps", 1]
        if name == "quickstart":
            options += ["--model.model", FOLDER / "handwriting.json"]
        elif stage == 3:
            options += ["--model.image_size", size]
        if stage > 1:
            options += ["--from_run", tmp_path / str(stage - 1) / "run"]
        fit([shrunk_heads(path, folder) for path in files(name, stage)], *options)
        run = RunFolder(folder / "run")
        lines = lines_of(run)
        steps = [line["step"] for line in lines if "train/loss" in line]
        assert steps == list(range(ENDS[stage - 2] + 1 if stage > 1 else 1, end + 1))
        rates += [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
        state = torch.load(run.checkpoint(end), weights_only=True)["state_dict"]
        if stage > 1:
            teacher = state[f"teacher.{POSITIONS[name].removeprefix('towers.clip.')}"]
            assert teacher.shape == state[POSITIONS[name]].shape
            assert not torch.equal(teacher, state[POSITIONS[name]])
            assert all(
                line["train/self_distillation_weight"] == 0.25
                for line in lines
                if "train/self_distillation_weight" in line
            )
        assert state[POSITIONS[name]].shape[-2] == 1 + (size // 16) ** 2
    assert rates == sorted(rates, reverse=True)  # of one cosine, after a step of warm-up
    assert rates[-1] < 0.2 * rates[0]
    out = tmp_path / "export"
    kind = "open_clip" if name == "quickstart" else "safetensors"
    done = run_forked("export", "--run_dir", run.path, "--to", kind, "--out", out)
    assert done.returncode == 0, done.stderr


def test_a_published_folder_trains_on_with_a_fresh_decoder(parts, tmp_path):
    path = FOLDER / "published_b16.yaml"
    recipe = yaml.safe_load(path.read_text())
    model = write_folder(tmp_path / "published", "siglip")
    options = shrunk(recipe, parts, tmp_path)
    options += ["--model.model", f"local-dir:{tmp_path / 'published'}"]
    options += ["--model.calibration_pairs", "null"]  # no scale fits random weights
    fit([path], *options, "--trainer.precision", "32-true")
    run = RunFolder(tmp_path / "run")
    assert [line["step"] for line in lines_of(run) if "val/loss" in line] == [0, 2]
    state = torch.load(run.checkpoint(2), weights_only=True)["state_dict"]
    words = state["towers.clip.text.token_embedding.weight"]
    published = model.text_model.embeddings.token_embedding.weight
    assert torch.allclose(words, published, atol=1e-2)
    assert not torch.equal(words, published)
    assert state["objectives.captioning.output.weight"].any()


def test_every_file_belongs_to_a_chain():
    listed = {path for name in ("b16", "quickstart") for path in files(name, 3)}
    assert {*FOLDER.glob("*.yaml")} == listed | {FOLDER / "published_b16.yaml"}
