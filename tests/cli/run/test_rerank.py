"""``rerank`` for real: a head on a frozen dual encoder, one rank and two, resumed, written."""

import json
import shutil

import pytest
import torch
import yaml

from dist_siglip.cli import main
from dist_siglip.cli.run.rerank import HEAD_NAME
from dist_siglip.models.reranker import read_head
from dist_siglip.runs import RunFolder
from dist_siglip.training.module.trained import load_trained
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked

pytestmark = pytest.mark.e2e


def losses(run):
    lines = map(json.loads, RunFolder(run).metrics.read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def state(run, step=15):
    return torch.load(RunFolder(run).checkpoint(step), weights_only=True)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A configuration whose dual encoder is a run of one step."""
    folder = tmp_path_factory.mktemp("rerank")
    path = write_settings(folder)
    done = run_forked("fit", "--config", path, "--trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(path.read_text())
    found["model"] = {
        "run_dir": found["run_dir"],
        "head": {"width": 16, "heads": 2, "layers": 1},
        "hard_negatives": 2,
        "candidates": 5,
        "optim": {"learning_rate": 0.01, "epsilon": 0.01, "warmup_steps": 2},
    }
    found["run_dir"] = str(folder / "head")
    path = folder / "rerank.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


@pytest.fixture(scope="module")
def trained(settings):
    """Fifteen steps on one process."""
    done = run_forked("rerank", "fit", "--config", settings)
    assert done.returncode == 0, done.stderr
    assert "20 pairs, 5 candidates re-ranked" in done.stderr
    return RunFolder(settings.parent / "head")


def test_checkpoints_hold_the_head_alone_and_whose_tokens_it_reads(trained):
    saved = state(trained.path)
    assert all(name.startswith("head.") for name in saved["state_dict"])
    assert set(saved["towers"]) == {"image", "text"}
    assert trained.steps_with_checkpoint() == [12, 15]


def test_the_run_leaves_a_head_that_the_library_reads(trained, settings):
    built = load_trained(run_dir=str(settings.parent / "run"))
    head = read_head(trained.path / HEAD_NAME, built)
    for name, value in state(trained.path)["state_dict"].items():
        assert torch.equal(head.state_dict()[name.removeprefix("head.")], value)
    assert trained.report.stat().st_size > 0


def test_an_evaluation_says_what_both_find(trained):
    metrics = json.loads((trained.evaluation / "metrics.json").read_text())
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert 0 <= metrics[f"reranked_{direction}_recall@{k}"] <= 1
        # Five candidates change places among themselves only.
        name = f"{direction}_recall@5"
        assert metrics[f"reranked_{name}"] == metrics[name]


def test_a_new_head_is_evaluated_before_its_first_step_and_changes_nothing(trained):
    lines = list(map(json.loads, trained.metrics.read_text().splitlines()))
    first = next(line for line in lines if "val/image_to_text_recall@1" in line)
    assert first["step"] == 0
    for name in ("image_to_text_recall@1", "text_to_image_recall@1"):
        assert first[f"val/reranked_{name}"] == first[f"val/{name}"]


def test_two_ranks_train_the_same_head(trained, settings, tmp_path):
    done = run_forked(
        "rerank",
        "fit",
        "--config",
        settings,
        "--trainer.devices=2",
        f"--run_dir={tmp_path / 'head'}",
        world_size=2,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "head") == pytest.approx(losses(trained.path), rel=1e-4)
    ours, theirs = (state(path)["state_dict"] for path in (trained.path, tmp_path / "head"))
    for name, value in ours.items():
        assert torch.allclose(theirs[name], value, rtol=1e-3, atol=1e-5), name


def test_a_run_that_lost_its_end_goes_on_to_the_same_head(trained, settings, tmp_path):
    folder = RunFolder(tmp_path / "head")
    shutil.copytree(trained.path, folder.path)
    folder.checkpoint(15).unlink()
    (folder.path / HEAD_NAME).unlink()
    done = run_forked("rerank", "fit", "--config", settings, f"--run_dir={folder.path}")
    assert done.returncode == 0, done.stderr
    for name, value in state(trained.path)["state_dict"].items():
        assert torch.equal(state(folder.path)["state_dict"][name], value), name
    assert (folder.path / HEAD_NAME).read_bytes() == (trained.path / HEAD_NAME).read_bytes()


def refusal(settings, tmp_path, capsys, *options):
    arguments = ["--config", str(settings), f"--run_dir={tmp_path / 'new'}", *options]
    assert main(["rerank", "fit", *arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_work_is_one_line(settings, tmp_path, capsys):
    said = refusal(settings, tmp_path, capsys, "--model.run_dir=null")
    assert "name either run_dir, a run that has a checkpoint, or model" in said
    said = refusal(settings, tmp_path, capsys, "--model.candidates=0")
    assert "candidates (0) must be at least 1" in said
    said = refusal(settings, tmp_path, capsys, "--model.head.width=15")
    assert "width (15) must be a positive multiple of heads (2)" in said
    said = refusal(settings, tmp_path, capsys, f"--data.train_features={tmp_path}")
    assert "hold no tokens, which rerank reads" in said
    assert not (tmp_path / "new").exists()


def test_a_head_of_other_towers_is_refused(trained, settings, tmp_path):
    """The dual encoder was trained on after its head was."""
    folder = RunFolder(tmp_path / "new")
    shutil.copytree(trained.path, folder.path)
    saved = state(folder.path)
    saved["towers"]["text"] = "0" * 16
    torch.save(saved, folder.checkpoint(15))
    arguments = ["--config", settings, f"--run_dir={folder.path}", "--trainer.max_steps=16"]
    done = run_forked("rerank", "fit", *arguments, "--model.optim.accept_rate_jump=true")
    assert done.returncode == 2
    assert "the head of the checkpoint reads the tokens of another text tower" in done.stderr
