"""``calibrate`` for real: on one rank and two, and before the first step of a run."""

import json

import pytest

from dist_siglip.cli import main
from dist_siglip.runs import RunFolder
from tests.support.command import run_command, write_settings
from tests.support.forked_runs import run_forked, warm_python

pytestmark = pytest.mark.e2e

NUM_PAIRS = 72  # all training pairs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned to tell its training pairs apart a little."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_forked(
        "fit",
        "--config",
        write_settings(folder),
        "--trainer.max_steps=200",
        "--trainer.val_check_interval=200",
        "--model.optim.learning_rate=0.003",
        "--model.optim.epsilon=1e-8",
        "--model.logits.start_scale=5",
        "--model.logits.start_bias=-3",
    )
    assert done.returncode == 0, done.stderr
    return RunFolder(folder / "run")


def calibrate(capsys, *arguments):
    """Run the command in this process and return what it prints as JSON."""
    assert main(["calibrate", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_reports_the_fit_for_the_run_and_leaves_the_run_alone(trained, capsys):
    files = sorted(trained.path.rglob("*"))
    facts = calibrate(capsys, "--config", trained.config)
    assert facts["checkpoint"] == str(trained.newest_checkpoint())
    assert facts["pairs"] == NUM_PAIRS
    assert facts["global_batch_size"] == 12
    assert facts["expected_loss"] < facts["expected_loss_before"]
    assert facts["relative_bias"] == pytest.approx(-facts["logit_bias"] / facts["logit_scale"])
    assert sorted(trained.path.rglob("*")) == files


def test_two_ranks_fit_the_same(trained, capsys):
    words = ["calibrate", "--config", trained.config, "--json", "--trainer.devices=2"]
    done = run_command(*words, python=warm_python())
    assert done.returncode == 0, done.stderr
    facts = calibrate(capsys, "--config", trained.config)
    for name, value in json.loads(done.stdout).items():
        assert value == (facts[name] if isinstance(value, str) else pytest.approx(facts[name]))


def test_the_table_shows_what_to_set(trained, capsys):
    arguments = ["--split=val", "--pairs=15", "--data.global_batch_size=64"]
    assert main(["calibrate", "--config", str(trained.config), *arguments]) == 0
    out = capsys.readouterr().out
    assert "15 pairs (val), global batch 64" in out
    assert "expected loss" in out
    assert "--model.logits.start_scale" in out.splitlines()[-1]


def test_a_run_is_calibrated_before_its_first_step(trained, tmp_path, capsys):
    """One batch holds all pairs: its first loss is the expected loss, before and after."""
    arguments = [
        "--config",
        trained.config,
        f"--model.pretrained={trained.newest_checkpoint()}",
        "--model.logits.start_scale=null",
        "--model.logits.start_bias=null",
        f"--data.global_batch_size={NUM_PAIRS}",
        "--data.train_crop_scale=null",
        "--trainer.max_steps=1",
    ]
    warning = f"was trained with a global batch of 12, this run has {NUM_PAIRS}"
    firsts = {}
    for pairs, devices in (("null", 1), ("4096", 2)):
        run = RunFolder(tmp_path / pairs)
        done = run_forked(
            "fit",
            *arguments,
            f"--run_dir={run.path}",
            f"--model.calibration_pairs={pairs}",
            f"--trainer.devices={devices}",
            f"--model.micro_batch_size={10 * devices}",
            world_size=devices,
        )
        assert done.returncode == 0, done.stderr
        assert (warning in done.stderr) == (pairs == "null")
        assert ("calibrated before the first step" in done.stderr) == (pairs == "4096")
        lines = map(json.loads, run.metrics.read_text().splitlines())
        firsts[pairs] = next(line for line in lines if "train/loss" in line)
    asked = calibrate(capsys, *arguments, f"--run_dir={tmp_path / 'none'}")
    assert asked["expected_loss"] < asked["expected_loss_before"]
    assert firsts["null"]["train/loss"] == pytest.approx(asked["expected_loss_before"], rel=1e-4)
    assert firsts["4096"]["train/loss"] == pytest.approx(asked["expected_loss"], rel=1e-4)
    assert firsts["4096"]["train/logit_scale"] == pytest.approx(asked["logit_scale"], rel=1e-4)
    assert firsts["4096"]["train/logit_bias"] == pytest.approx(asked["logit_bias"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs=1"], "pairs (1) must be at least 2"),
        (["--split=test"], "split"),
        (["--model.loss=dist_siglip.losses.ClipLoss"], "uses no bias"),
        (["--ckpt_path=none.ckpt"], "checkpoint (none.ckpt) does not exist"),
    ],
)
def test_a_mistake_is_one_line(trained, options, message, capsys):
    assert main(["calibrate", "--config", str(trained.config), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert sum(line.startswith("dist-siglip: error: ") for line in lines) == 1
