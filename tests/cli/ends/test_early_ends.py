"""Runs that end before ``max_steps``, or try only a few steps: what they leave, say and return."""

import json

import pytest

from dist_siglip.cli.table import print_evaluation
from dist_siglip.runs import RunFolder
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked

pytestmark = pytest.mark.e2e
COLLAPSED = 4


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_settings(tmp_path_factory.mktemp("settings"), max_steps=100, val_check_interval=4)


def fit(settings, run, *options, world_size=1):
    ranks = [f"--trainer.devices={world_size}"]
    arguments = ["fit", "--config", settings, f"--run_dir={run.path}", *ranks, *options]
    return run_forked(*arguments, world_size=world_size)


def evaluated_step(run):
    return json.loads((run.evaluation / "metrics.json").read_text())["step"]


def test_the_alarm_ends_both_ranks_at_once_with_code_4_a_checkpoint_and_a_report(
    settings, tmp_path
):
    run = RunFolder(tmp_path / "run")
    # So nervous that the first dip of a rank is a collapse.
    nervous = ["--collapse_alarm.action=stop", "--collapse_alarm.rank_share=0.9999"]
    done = fit(settings, run, *nervous, world_size=2)
    assert done.returncode == COLLAPSED, done.stderr
    last = max(run.steps_with_checkpoint())
    assert evaluated_step(run) == last
    assert last % 4 == 0
    assert done.stderr.count("the model may be collapsing at step") == 1
    assert f"may be collapsing at step {last}: " in done.stderr
    assert f"stopped at step {last} of 100 by collapse_alarm" in run.log.read_text()
    assert run.report.exists()
    again = fit(settings, run, *nervous)
    assert again.returncode == COLLAPSED, again.stderr
    assert max(run.steps_with_checkpoint()) > last


def test_early_stopping_is_a_normal_end_and_stays_one(settings, tmp_path):
    run = RunFolder(tmp_path / "run")
    stopping = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"]
    stopping += ["--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.mode=max"]
    stopping += ["--trainer.callbacks.patience=1", "--model.optim.learning_rate=1e-5"]
    done = fit(settings, run, *stopping)
    assert done.returncode == 0, done.stderr
    last = max(run.steps_with_checkpoint())
    assert evaluated_step(run) == last < 100
    reason = "EarlyStopping: Monitored metric val/loss did not improve in the last 1 records. Best"
    said = f"stopped early at step {last} of 100 because {reason}"
    assert said in run.log.read_text()
    assert run.report.exists()
    # A chain of jobs starts it again and again.
    again = fit(settings, run, *stopping)
    assert again.returncode == 0, again.stderr
    assert said in again.stderr
    assert max(run.steps_with_checkpoint()) == last

    bar = "--trainer.callbacks+=lightning.pytorch.callbacks.RichProgressBar"
    files = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    tried = fit(settings, run, "--trainer.fast_dev_run=2", bar)
    assert tried.returncode == 0, tried.stderr
    assert "fast_dev_run went through; nothing of it is kept" in tried.stderr
    assert "report" not in tried.stderr
    assert files == {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}


def test_a_run_whose_time_is_over_ends_normally(settings, tmp_path):
    run = RunFolder(tmp_path / "run")
    slow = ["--trainer.callbacks+=tests.support.slow_steps.SlowSteps"]
    slow += [f"--trainer.callbacks.while_exists={settings}", "--trainer.max_time=00:00:00:01"]
    done = fit(settings, run, *slow, "--trainer.val_check_interval=1000")
    assert done.returncode == 0, done.stderr
    last = max(run.steps_with_checkpoint())
    assert evaluated_step(run) == last < 100
    assert f"stopped early at step {last} of 100 because its time (max_time) is over: 0:0" in (
        done.stderr
    )
    assert run.report.exists()
    before = evaluated_at(run)
    again = fit(settings, run, *slow, "--trainer.val_check_interval=1000")
    assert again.returncode == 0, again.stderr
    assert evaluated_at(run) == before


def evaluated_at(run):
    return (run.evaluation / "metrics.json").stat().st_mtime_ns


def test_a_run_whose_epochs_are_over_ends_normally(settings, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    options = ["--trainer.limit_train_batches=3", "--trainer.max_epochs=2"]
    options += ["--trainer.limit_val_batches=1", "--data.val_local_batch_size=8"]
    done = fit(settings, run, *options)
    assert done.returncode == 0, done.stderr
    assert "stopped early at step 6 of 100 because trainer.max_epochs is 2" in done.stderr
    assert evaluated_step(run) == 6
    # What an evaluation did not see is said wherever its numbers are.
    assert "evaluation at step 6: 8 of 20 pairs, loss " in done.stderr
    metrics = json.loads((run.evaluation / "metrics.json").read_text())
    assert (metrics["gallery_pairs"], metrics["available_pairs"]) == (8, 20)
    assert '"val/available_pairs": 20.0' in run.metrics.read_text()
    assert "The newest evaluation saw 8 of 20 pairs." in run.report.read_text()
    print_evaluation(run)
    assert "gallery of 8 of 20 pairs" in capsys.readouterr().out
