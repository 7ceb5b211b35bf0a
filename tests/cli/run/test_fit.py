"""``fit`` and ``validate`` for real: ranks, kill, resume, evaluation, files."""

import json

import pytest
import torch
import yaml

from dist_siglip.runs import RunFolder
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked, start
from tests.support.recording import global_batches

pytestmark = pytest.mark.e2e


def recording(folder):
    return [
        "--trainer.callbacks+=tests.support.recording.RecordSamples",
        f"--trainer.callbacks.folder={folder}",
    ]


def weights(run, step):
    path = RunFolder(run).checkpoint(step)
    return torch.load(path, weights_only=True)["state_dict"]


def losses(run):
    lines = map(json.loads, RunFolder(run).metrics.read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Fifteen steps on one process: two and a half epochs of 72 pairs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    settings = write_settings(folder)
    done = run_forked("fit", "--config", settings, *recording(folder / "order"))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_what_the_readme_lists(uninterrupted):
    run = RunFolder(uninterrupted / "run")
    assert run.steps_with_checkpoint() == [12, 15]
    assert sorted(path.name for path in run.evaluation.iterdir()) == [
        "arrays.npz",
        "examples.json",
        "history",
        "metrics.json",
    ]
    assert list(run.kept_evaluations())[-1] == 15
    for path in (run.config, run.provenance, run.metrics, run.log, run.report):
        assert path.stat().st_size > 0, path
    assert any((run.path / "tensorboard").iterdir())
    assert list(losses(run.path)) == list(range(1, 16))
    last = json.loads((run.evaluation / "metrics.json").read_text())
    assert last["step"] == 15
    assert last["gallery_pairs"] == 20


def test_each_epoch_trains_every_sample_once(uninterrupted):
    batches = global_batches(uninterrupted / "order")
    assert list(batches) == list(range(1, 16))
    epochs = [[i for s in range(first, first + 6) for i in batches[s]] for first in (1, 7)]
    assert all(sorted(epoch) == list(range(72)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("devices", [2, 3])
def test_several_ranks_train_the_same_model(uninterrupted, devices, tmp_path):
    """Same batches, same loss curve, same parameters as one process, up to float32 rounding.

    Two ranks are started by Lightning's launcher, three as torchrun does.
    """
    arguments = [
        "fit",
        "--config",
        uninterrupted / "settings.yaml",
        f"--trainer.devices={devices}",
        f"--run_dir={tmp_path / 'run'}",
        *recording(tmp_path / "order"),
    ]
    done = run_forked(*arguments, world_size=1 if devices == 2 else devices)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert global_batches(tmp_path / "order") == global_batches(uninterrupted / "order")
    expected = losses(uninterrupted / "run")
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)
    theirs = weights(tmp_path / "run", 15)
    for name, value in weights(uninterrupted / "run", 15).items():
        assert torch.allclose(theirs[name], value, rtol=1e-3, atol=1e-5), name


def test_killed_and_resumed_on_other_ranks_sees_the_same_samples(uninterrupted, tmp_path):
    """SIGKILL after step 4 on 2 ranks; go on with 3, kill again; finish on 1."""
    settings = ["--config", uninterrupted / "settings.yaml", f"--run_dir={tmp_path / 'run'}"]
    run = RunFolder(tmp_path / "run")
    for step, devices in ((4, 2), (8, 3)):
        arguments = ["fit", *settings, f"--trainer.devices={devices}"]
        ranks = start([*arguments, *recording(tmp_path / "order")], tmp_path / "log", devices)
        is_saved = ranks.wait_until(lambda step=step: step in run.steps_with_checkpoint())
        assert is_saved, ranks.said()
        ranks.kill()
    (tmp_path / "order").rename(tmp_path / "before")
    resumed_from = max(run.steps_with_checkpoint())
    done = run_forked(
        "fit", "--config", run.config, "--trainer.devices=1", *recording(tmp_path / "order")
    )
    assert done.returncode == 0, done.stderr
    expected = global_batches(uninterrupted / "order")
    resumed = global_batches(tmp_path / "order")
    assert resumed == {step: expected[step] for step in range(resumed_from + 1, 16)}
    logged = losses(tmp_path / "run")
    # A kill between a checkpoint and the log line of its step costs that line, nothing else.
    assert set(range(1, 16)) - set(logged) <= {4, 8, 12}
    curve = losses(uninterrupted / "run")
    assert logged == pytest.approx({step: curve[step] for step in logged}, rel=1e-4)


def test_a_finished_run_says_so_and_is_left_alone(uninterrupted):
    before = RunFolder(uninterrupted / "run").checkpoint(15).stat().st_mtime_ns
    done = run_forked("fit", "--config", uninterrupted / "run" / "config.yaml")
    assert done.returncode == 0
    assert "is complete: step 15 of 15" in done.stderr
    assert RunFolder(uninterrupted / "run").checkpoint(15).stat().st_mtime_ns == before


def test_validate_repeats_the_evaluation_on_two_ranks(uninterrupted):
    metrics = uninterrupted / "run" / "evaluation" / "metrics.json"
    before = json.loads(metrics.read_text())
    done = run_forked(
        "validate", "--config", uninterrupted / "run" / "config.yaml", "--trainer.devices=2"
    )
    assert done.returncode == 0, done.stderr
    assert "identical caption counts as a hit" in " ".join(done.stderr.split())
    after = json.loads(metrics.read_text())
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_mixed_precision_with_clipping_trains(uninterrupted, tmp_path):
    """Lightning's own clipping refuses fused AdamW under bf16-mixed."""
    done = run_forked(
        "fit",
        "--config",
        uninterrupted / "settings.yaml",
        f"--run_dir={tmp_path / 'run'}",
        "--trainer.precision=bf16-mixed",
        "--trainer.gradient_clip_val=0.5",
    )
    assert done.returncode == 0, done.stderr
    expected = losses(uninterrupted / "run")
    assert losses(tmp_path / "run")[1] == pytest.approx(expected[1], rel=2e-2)
    assert "precision bf16-mixed\n" in RunFolder(tmp_path / "run").log.read_text()


def test_another_experiment_in_the_folder_is_refused(uninterrupted):
    before = (uninterrupted / "run" / "config.yaml").read_text()
    done = run_forked("fit", "--config", uninterrupted / "settings.yaml", "--seed_everything=4")
    assert done.returncode == 2
    assert "holds another run: seed_everything (3 in the folder, 4 now)" in done.stderr
    assert (uninterrupted / "run" / "config.yaml").read_text() == before


def test_a_checkpoint_of_another_model_is_refused(uninterrupted, tmp_path):
    done = run_forked(
        "fit",
        "--config",
        uninterrupted / "settings.yaml",
        f"--run_dir={tmp_path / 'run'}",
        "--model.model=RN50",
        f"--ckpt_path={RunFolder(uninterrupted / 'run').checkpoint(15)}",
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "belongs to another model: missing towers.clip" in line
    assert not (tmp_path / "run").exists()


def test_the_resolved_configuration_is_complete_yaml(uninterrupted):
    config = yaml.safe_load((uninterrupted / "run" / "config.yaml").read_text())
    assert config["model"]["loss"]["init_args"]["exchange"] == "ring"
    assert config["data"]["global_batch_size"] == 12
    assert config["checkpoint"]["every_steps"] == 4
    assert config["checkpoint"]["keep_best_of"] is None
