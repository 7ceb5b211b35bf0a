"""Whatever happens to one rank of ``fit``, every rank ends, soon, and the log names it."""

import json
import subprocess

import pytest
import yaml

from tests.support.command import (
    REPOSITORY,
    environment,
    run_command,
    write_settings,
)
from tests.support.forked_runs import warm_python
from tests.support.ports import next_port

pytestmark = pytest.mark.faults
HUNG = 70
# Shorter than what ``Fault`` takes where it may: those who wait must not be impatient.
LIMITS = ("--watchdog.stall_minutes=0.1", "--watchdog.slow_minutes=5")
SLOW = "--trainer.callbacks.init_args.slow_seconds=9"
FAULT = "--trainer.callbacks+=tests.support.watched_runs.Fault"


def _fault(kind, *options):
    return (FAULT, f"--trainer.callbacks.init_args.kind={kind}", *options)


SCENARIOS = {
    "data": (_fault("none", SLOW, "--data.stages=[tests.support.watched_runs.sleep_on_rank_1]"),)
    * 2,
    "step": (_fault("sleep"),) * 2,
    "stopped": (_fault("stop"),) * 2,
    "killed": (_fault("kill"),) * 2,
    "raises": (_fault("raise"),) * 2,
    "settings": ((), ("--model.optim.learning_rate=0.5",)),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Exit code and stderr of both ranks, by scenario; and the folder.

    A rank that has not ended after ``watched_runs.LIMIT_SECONDS`` is killed: its code is -9.
    """
    root, folder = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("settings")
    settings = write_settings(folder, devices=2, val_check_interval=3, max_steps=1000)
    common = ["--config", str(settings), "--checkpoint.every_steps=4", *LIMITS]
    scenarios = {
        name: [next_port(), str(root / name), [[*common, *options] for options in ranks]]
        for name, ranks in SCENARIOS.items()
    }
    done = subprocess.run(
        [warm_python(), "-m", "tests.support.watched_runs"],
        input=yaml.safe_dump(scenarios),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
        timeout=800,
        check=True,
    )
    return json.loads(done.stdout), root


def log_of(root, scenario):
    return (root / scenario / "run" / "log.txt").read_text()


def test_a_rank_that_hangs_in_its_data_is_named_after_a_slow_start_and_a_slow_evaluation(ended):
    results, root = ended
    assert [code for code, _ in results["data"]] == [HUNG, HUNG]
    log = log_of(root, "data")
    assert "evaluation at step 3" in log
    assert "training stalled: rank 1 is behind: waiting for data, step " in log
    assert "in stand_still_in_the_data (watched_runs.py:" in log
    assert "; rank 0 waiting in " in log
    for rank in (0, 1):
        stacks = (root / "data" / "run" / "stacks" / f"rank={rank:05d}.txt").read_text()
        assert "most recent call first" in stacks


def test_a_rank_that_hangs_in_a_step_is_named(ended):
    results, root = ended
    assert [code for code, _ in results["step"]] == [HUNG, HUNG]
    assert "rank 1 is behind: step 6, for " in log_of(root, "step")


def test_a_rank_that_is_stopped_is_named(ended):
    results, root = ended
    assert [code for code, _ in results["stopped"]] == [HUNG, -9]
    assert "rank 1 does not answer: it was killed, is stopped" in log_of(root, "stopped")


def test_a_rank_that_is_killed_is_named(ended):
    results, root = ended
    assert [code for code, _ in results["killed"]] == [1, -9]
    assert "rank 1 does not answer: it was killed" in log_of(root, "killed")


def test_a_rank_that_fails_is_named_with_what_it_failed_with(ended):
    results, root = ended
    assert [code for code, _ in results["raises"]] == [1, 1]
    text = "a collective failed: rank 1 failed in step 6: KeyError: 'a defect of rank 1'"
    assert text in log_of(root, "raises")


def test_ranks_with_different_settings_end_with_code_2_and_both_values(ended):
    results, _ = ended
    for code, said in results["settings"]:
        assert code == 2
        assert "error: ranks were not started alike: model.optim.learning_rate is " in said
        assert "0.5 on rank 1" in said
        assert "0.01 on rank 0" in said


def test_a_hang_ends_both_ranks_of_lightnings_launcher_with_code_70(tmp_path):
    settings = write_settings(tmp_path, devices=2, val_check_interval=1000, max_steps=1000)
    words = ["fit", "--config", settings, *LIMITS, *_fault("sleep")]
    done = run_command(*words, python=warm_python())
    assert done.returncode == HUNG, done.stderr
    assert "rank 1 is behind: step 6, for " in done.stderr
