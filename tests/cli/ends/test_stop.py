"""A run that is asked to stop saves, leaves with 75, and later goes on; under every launcher."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dist_siglip.runs import RunFolder
from tests.support.command import (
    is_group_alive,
    launched,
    write_settings,
)
from tests.support.forked_runs import start, warm_python
from tests.support.processes import LIMIT_SECONDS

pytestmark = pytest.mark.faults
LONG = (
    "--trainer.max_steps=100000",
    "--trainer.val_check_interval=100000",
    "--stop.agree_every_steps=3",
    "--checkpoint.every_steps=4",
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_settings(tmp_path_factory.mktemp("settings"))


def arguments(settings, run, *options):
    return ["fit", "--config", settings, f"--run_dir={run.path}", *options]


def wait_until(is_time, seconds=LIMIT_SECONDS):
    deadline = time.monotonic() + seconds
    while not is_time():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(settings, tmp_path):
    """Two ranks as torchrun starts them; two signals, to the second rank."""
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    options = ["--trainer.max_steps=60", "--trainer.val_check_interval=60"]
    options += ["--trainer.devices=2", "--checkpoint.every_steps=10", "--stop.agree_every_steps=1"]
    run = start(arguments(settings, whole, *options), tmp_path / "whole.txt", world_size=2)
    assert run.wait() == [0, 0], run.said()
    stopped = start(arguments(settings, parts, *options), tmp_path / "parts.txt", world_size=2)
    wait_until(lambda: parts.newest_checkpoint() is not None)
    stopped.signal(signal.SIGUSR2, rank=1)
    time.sleep(0.02)
    stopped.signal(signal.SIGTERM, rank=1)
    assert stopped.wait() == [75, 75], stopped.said()
    last = max(parts.steps_with_checkpoint())
    assert last < 60
    assert f"asked to stop (another rank): saving after step {last}" in parts.log.read_text()
    again = start(arguments(settings, parts, *options), tmp_path / "again.txt", world_size=2)
    assert again.wait() == [0, 0], again.said()
    first, second = (
        torch.load(run.checkpoint(60), weights_only=True)["state_dict"] for run in (whole, parts)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_an_earlier_start_did_not_come_to_is_made_up_for(settings, tmp_path):
    """Ended before the evaluation due at its checkpoint; then before the report."""
    run = RunFolder(tmp_path / "run")
    options = ["--trainer.max_steps=12", "--trainer.val_check_interval=6"]
    options += ["--checkpoint.every_steps=6"]
    assert start(arguments(settings, run, *options), tmp_path / "1.txt").wait() == [0]
    evaluated = evaluations(run)
    assert list(evaluated) == [6, 12]
    run.checkpoint(12).unlink()
    (run.evaluation / "metrics.json").unlink()
    run.metrics.write_text("")
    assert start(arguments(settings, run, *options), tmp_path / "2.txt").wait() == [0]
    assert evaluations(run) == evaluated
    run.report.unlink()
    before = run.checkpoint(12).stat().st_mtime_ns
    assert start(arguments(settings, run, *options), tmp_path / "3.txt").wait() == [0]
    assert run.report.exists()
    assert run.checkpoint(12).stat().st_mtime_ns == before


def evaluations(run):
    """Validation loss by step, of the log; each step once."""
    lines = map(json.loads, run.metrics.read_text().splitlines())
    found = [(line["step"], line["val/loss"]) for line in lines if "val/loss" in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_the_first_rank_of_lightnings_launcher_is_asked_and_all_stop(settings, tmp_path):
    run = RunFolder(tmp_path / "run")
    options = (*LONG, "--trainer.devices=2")
    ranks = start(arguments(settings, run, *options), tmp_path / "said.txt")
    try:
        assert ranks.wait_until(lambda: run.newest_checkpoint() is not None), ranks.said()
        ranks.signal(signal.SIGTERM)
        assert ranks.wait() == [75], ranks.said()
        wait_until(lambda: not is_group_alive(ranks.ranks[0].pid), 20)
    finally:
        ranks.kill()
    last = max(run.steps_with_checkpoint())
    assert last % 3 == 0
    assert torch.load(run.checkpoint(last), weights_only=True)["global_step"] == last
    assert f"asked to stop (SIGTERM): saving after step {last}" in run.log.read_text()


def test_a_signal_while_python_imports_is_remembered(settings, tmp_path):
    """Sent as soon as the handler is there, seconds before torch is."""
    run = RunFolder(tmp_path / "run")
    with launched("dist_siglip", *arguments(settings, run, *LONG)) as process:
        caught = 1 << (signal.SIGUSR1 - 1)
        wait_until(lambda: caught & handled(process.pid))
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=LIMIT_SECONDS) == 75
    assert run.steps_with_checkpoint() == [3]


def test_one_rank_of_torchrun_is_asked_and_both_stop(settings, tmp_path):
    run = RunFolder(tmp_path / "run")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dist_siglip"]
    command = [*torchrun, *arguments(settings, run, *LONG), "--trainer.devices=2"]
    with launched(*command, PYTHON_EXEC=str(warm_python())) as process:
        wait_until(lambda: run.newest_checkpoint() is not None, 90)
        os.kill(children(process.pid)[1], signal.SIGUSR1)
        assert process.wait(timeout=LIMIT_SECONDS) != 0  # torchrun passes no code on
    last = max(run.steps_with_checkpoint())
    assert last % 3 == 0
    assert "asked to stop (another rank)" in run.log.read_text()


def handled(pid):
    """The set of signals a process has handlers for, as Linux tells it."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("SigCgt")).split()[1], 16)


def children(pid):
    """Process ids of the children, in the order they were started."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
