"""The stages of configs/siglip2: one schedule in three runs, in small, as the files say."""

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from dist_siglip.data.handwriting import write_handwriting_shards
from dist_siglip.runs import RunFolder
from dist_siglip.training.module import load_trained
from dist_siglip.training.optim import OptimConfig
from dist_siglip.training.optim.build import scheduled_factor
from tests.project.test_recipes import shrunk
from tests.support.forked_runs import run_forked
from tests.support.hugging_face import write_folder
from tests.support.naflex import FIXED as SQUARES
from tests.support.tiny_models import ARCHITECTURES, write_config

FOLDER = Path(__file__).parents[2] / "configs/siglip2"
POSITIONS = "towers.clip.visual.trunk.pos_embed"
CHANCES = 4  # of a guess, that recall is above in the quickstart cut short
CUT_SHORT = (640, 660, 680, 680)  # the last step of each run of it
CUT_SCHEDULE = 800  # stage 2 begins at 80 % of it
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


def check_chain(recipes):
    """Stages share one schedule, in the shares of the paper, and name each other."""
    total = recipes[0]["model"]["optim"]["schedule_steps"]
    shares = [recipe["trainer"]["max_steps"] / total for recipe in recipes]
    assert shares == pytest.approx([0.8, 0.95, 1.0], abs=1e-6)
    assert "from_run" not in recipes[0]
    for before, after in pairwise(recipes):
        assert after["from_run"] == before["run_dir"]


def test_stages_share_one_schedule_and_go_on_from_each_other(parts, tmp_path):
    recipes = [merged(files("b16", stage)) for stage in (1, 2, 3)]
    check_chain(recipes)
    rates = []
    for stage, (recipe, end, size) in enumerate(zip(recipes, ENDS, (32, 32, 64), strict=True), 1):
        folder = tmp_path / str(stage)
        options = shrunk(recipe, parts, folder)
        options += ["--trainer.max_steps", end, "--model.optim.schedule_steps", ENDS[-1]]
        options += ["--trainer.precision", "32-true", "--trainer.log_every_n_steps", 1]
        if stage == 3:
            options += ["--model.image_size", size]
        if stage > 1:
            options += ["--from_run", tmp_path / str(stage - 1) / "run"]
        fit([shrunk_heads(path, folder) for path in files("b16", stage)], *options)
        run = RunFolder(folder / "run")
        lines = lines_of(run)
        steps = [line["step"] for line in lines if "train/loss" in line]
        assert steps == list(range(ENDS[stage - 2] + 1 if stage > 1 else 1, end + 1))
        rates += [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
        state = torch.load(run.checkpoint(end), weights_only=True)["state_dict"]
        if stage > 1:
            teacher = state[f"teacher.{POSITIONS.removeprefix('towers.clip.')}"]
            assert teacher.shape == state[POSITIONS].shape
            assert not torch.equal(teacher, state[POSITIONS])
            assert all(
                line["train/self_distillation_weight"] == 0.25
                for line in lines
                if "train/self_distillation_weight" in line
            )
        assert state[POSITIONS].shape[-2] == 1 + (size // 16) ** 2
    assert rates == sorted(rates, reverse=True)  # of one cosine, after a step of warm-up
    assert rates[-1] < 0.2 * rates[0]


def test_the_naflex_copy_branches_off_at_nine_tenths(parts, tmp_path):
    paths = [FOLDER / "b16_1.yaml", FOLDER / "b16_naflex.yaml"]
    first, copy = merged(paths[:1]), merged(paths)
    optim, total = copy["model"]["optim"], first["model"]["optim"]["schedule_steps"]
    start = optim["schedule_start_step"]
    assert start == pytest.approx(0.9 * total, abs=1)
    assert copy["trainer"]["max_steps"] - start == pytest.approx(3.75 * 0.1 * total, abs=1)
    before = OptimConfig(**first["model"]["optim"])
    rate = before.learning_rate * scheduled_factor(before, total, start)
    assert optim["learning_rate"] == pytest.approx(rate, rel=5e-3)
    config = write_config(parts.folder / "squares.json", SQUARES)
    for number, recipe, end, more in (
        (1, first, 3, ["--model.optim.schedule_steps", 4]),
        (2, copy, 6, ["--from_run", tmp_path / "1/run", "--model.optim.schedule_start_step", 3]),
    ):
        options = shrunk(recipe, parts, tmp_path / str(number))
        options += ["--model.model", config, "--trainer.max_steps", end, *more]
        options += ["--trainer.precision", "32-true", "--trainer.log_every_n_steps", 1]
        if number == 2:
            options += ["--model.num_patches", 64, "--model.micro_batch_patches", 256]
            options += [
                "--data.sequence_lengths",
                "[16, 36, 64]",
                "--model.micro_batch_size",
                "null",
            ]
            options += ["--model.optim.warmup_steps", 0]
        said = fit(paths[:number], *options)
    assert "of the other form of image tower: towers.clip (3)" in said
    assert "fresh" not in said
    run = RunFolder(tmp_path / "2/run")
    lines = lines_of(run)
    assert [line["step"] for line in lines if "train/loss" in line] == [4, 5, 6]
    assert [line["step"] for line in lines if "val/loss" in line] == [3, 4, 6]
    ours = torch.load(run.checkpoint(6), weights_only=True)
    counts = {int(state["step"]) for state in ours["optimizer_states"][0]["state"].values()}
    assert counts == {6}
    assert ours["state_dict"]["towers.clip.visual.trunk.embeds.pos_embed"].shape == (1, 8, 8, 64)
    assert ours["ImageTextDataModule"]["samples_consumed"] == 6 * 8


def commands_of(path):
    """The commands in the head of a file, as words."""
    head = [line for line in path.read_text().splitlines() if line.startswith("#   ")]
    text = "\n".join(line.removeprefix("#").strip() for line in head).replace("\\\n", " ")
    commands = text.splitlines()
    (prefix,) = [each.partition("=")[2] for each in commands if each.startswith("q=")]
    for name in ("$q", "${q}"):
        commands = [each.replace(name, prefix) for each in commands]
    return [shlex.split(each) for each in commands if not each.startswith("q=")]


def test_the_quickstart_runs_whole_from_shards_to_an_export(tmp_path, monkeypatch):
    """As the head of its file says, but on one process, and for fewer steps of each stage."""
    import transformers

    recipes = [merged(files("quickstart", stage)) for stage in (1, 2, 3)]
    check_chain(recipes)
    (tmp_path / "configs").symlink_to(FOLDER.parent)
    monkeypatch.chdir(tmp_path)
    (_, _, code), *commands = commands_of(FOLDER / "quickstart.yaml")
    exec(code, {})
    assert [words[1] for words in commands] == ["fit", "fit", "fit", "fit", "export"]
    for words, last in zip(commands, (*CUT_SHORT, None), strict=True):
        more = []
        if last is not None:
            more = ["--trainer.devices", 1, "--trainer.max_steps", last]
            more += ["--model.optim.schedule_steps", CUT_SCHEDULE]
            more += ["--trainer.val_check_interval", 320 if last == CUT_SHORT[0] else 20]
        done = run_forked(*words[1:], *more)
        assert done.returncode == 0, done.stderr
    runs = [RunFolder(Path(recipe["run_dir"])) for recipe in recipes]
    copy = RunFolder(Path(f"{runs[-1].path}_40"))
    lines = [lines_of(run) for run in runs]
    # One schedule, one count of steps, one order of the data.
    trained = [[each for each in part if "train/loss" in each] for part in lines]
    steps = [each["step"] for part in trained for each in part]
    assert steps == sorted(set(steps))
    optim, total = OptimConfig(**recipes[0]["model"]["optim"]), CUT_SHORT[-1]
    optim = replace(optim, schedule_steps=CUT_SCHEDULE)
    for each in (each for part in trained for each in part if each["step"] > optim.warmup_steps):
        # A line may come a few steps behind the one it tells of, in a run that goes on.
        least, most = (
            optim.learning_rate * scheduled_factor(optim, optim.schedule_steps, each["step"] - back)
            for back in (1, 11)
        )
        assert least * 0.999 <= each["train/learning_rate"] <= most * 1.001
    states = [
        torch.load(run.checkpoint(step), weights_only=True)
        for run, step in zip([*runs, copy], CUT_SHORT, strict=True)
    ]
    size = recipes[0]["data"]["global_batch_size"]
    for state in states:
        assert state["ImageTextDataModule"]["samples_consumed"] == state["global_step"] * size
    moments = states[-1]["optimizer_states"][0]["state"]
    counts = {name: int(state["step"]) for name, state in moments.items()}
    first, second, *_ = CUT_SHORT
    assert counts["towers.clip.visual.trunk.norm.weight"] == total
    assert counts["objectives.captioning.output.weight"] == total
    assert counts["objectives.masked_prediction.mask_token"] == total - first
    assert counts[POSITIONS] == total - second
    assert states[-1]["state_dict"][POSITIONS].shape != states[0]["state_dict"][POSITIONS].shape
    # It finds numbers, in handwriting, neither of which it has ever seen; the copy: see the head.
    for part in lines:
        last = [each for each in part if "val/loss" in each][-1]
        recalls = [last[f"val/{way}_recall@1"] for way in ("image_to_text", "text_to_image")]
        assert min(recalls) > CHANCES / 100, recalls
    # The teacher has collapsed in neither way by the end of stage 2, and tells patches apart.
    last = trained[1][-1]
    for name in ("self_distillation", "masked_prediction"):
        assert last[f"train/{name}_entropy"] < 0.98
        assert last[f"train/{name}_mean_entropy"] > 0.05
    gap = last["train/masked_prediction_mean_entropy"] - last["train/masked_prediction_entropy"]
    assert gap > 0.05
    theirs = transformers.AutoModel.from_pretrained("runs/siglip2_quickstart/export").eval()
    ours = load_trained(run_dir=str(runs[-1].path))
    pixels = torch.randn(2, 3, ours.image_size, ours.image_size)
    texts = ours.tokenizer(["forty two", "ninety"])
    normalize = torch.nn.functional.normalize
    with torch.no_grad():
        pairs = (
            (theirs.vision_model(pixel_values=pixels), ours.encoder.eval().encode_image(pixels)),
            (theirs.text_model(input_ids=texts), ours.encoder.encode_text(texts)),
        )
    for expected, found in pairs:
        expected = normalize(expected.pooler_output, dim=-1)
        assert torch.allclose(normalize(found, dim=-1), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_published_folder_trains_on_in_stage_2_form_and_back(kind, parts, tmp_path):
    import transformers

    path = FOLDER / "published_b16.yaml"
    recipe = yaml.safe_load(path.read_text())
    names = [each["class_path"].rpartition(".")[2] for each in recipe["model"]["objectives"]]
    assert names == ["Captioning", "SelfDistillation", "MaskedPrediction"]
    model = write_folder(tmp_path / "published", kind)
    tokenizer = tmp_path / "published/tokenizer_config.json"
    # transformers pads on the left for Siglip2Model unless a folder says more.
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "padding_side": "right"}))
    options = shrunk(recipe, parts, tmp_path)
    options += ["--model.model", f"local-dir:{tmp_path / 'published'}", "--trainer.max_steps", 3]
    options += ["--model.calibration_pairs", "null"]  # no scale fits random weights
    options += ["--model.image_size", 32] if kind == "siglip2" else []  # views are of one size
    options += ["--trainer.precision", "32-true", "--trainer.log_every_n_steps", 1]
    fit([shrunk_heads(path, tmp_path / "small")], *options)
    run = RunFolder(tmp_path / "run")
    lines = lines_of(run)
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 2, 3]
    trained = [line for line in lines if "train/loss" in line]
    for line in trained:
        weighed = 0.25 * line["train/self_distillation_loss"]
        weighed += 0.0625 * line["train/masked_prediction_loss"] + line["train/caption_loss"]
        assert line["train/loss"] == pytest.approx(line["train/pair_loss"] + weighed, rel=1e-4)
    assert len(trained) == 3
    state = torch.load(run.checkpoint(3), weights_only=True)["state_dict"]
    words = state["towers.clip.text.token_embedding.weight"]
    published = model.text_model.embeddings.token_embedding.weight
    assert torch.allclose(words, published, atol=1e-2)
    assert not torch.equal(words, published)
    assert state["objectives.captioning.output.weight"].any()
    back = tmp_path / "back"
    done = run_forked("export", "--run_dir", run.path, "--to", "hf", "--out", back)
    assert done.returncode == 0, done.stderr
    theirs = transformers.AutoModel.from_pretrained(back).eval()
    assert type(theirs) is transformers.SiglipModel
    ours = load_trained(run_dir=str(run.path)).encoder.eval()
    pixels, texts = torch.randn(2, 3, 32, 32), torch.randint(3, 90, (2, 8))
    with torch.no_grad():
        pooled = (
            theirs.vision_model(pixel_values=pixels).pooler_output,
            theirs.text_model(input_ids=texts).pooler_output,
        )
        found = ours.encode_image(pixels), ours.encode_text(texts)
    for expected, feature in zip(pooled, found, strict=True):
        expected = torch.nn.functional.normalize(expected, dim=-1)
        assert torch.allclose(torch.nn.functional.normalize(feature, dim=-1), expected, atol=1e-5)


def test_every_file_belongs_to_a_chain():
    listed = {path for name in ("b16", "quickstart") for path in files(name, 3)}
    others = {
        FOLDER / f"{name}.yaml"
        for name in ("b16_naflex", "b16_curated", "published_b16", "locca_b16")
    }
    assert {*FOLDER.glob("*.yaml")} == listed | others
