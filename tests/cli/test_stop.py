"""A run that is asked to stop saves at a step all ranks agree on, and later goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dist_siglip.runs import RunFolder
from tests.support.command import (
    REPOSITORY,
    environment,
    is_group_alive,
    run_command,
    started_until,
    write_settings,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LONG = (
    "--trainer.max_steps=100000",
    "--trainer.val_check_interval=100000",
    "--stop.agree_every_steps=3",
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_settings(tmp_path_factory.mktemp("settings"))


def arguments(settings, run, *options):
    return ["fit", "--config", settings, f"--run_dir={run.path}", *options]


def wait_for_the_end(process, code):
    assert process.wait(timeout=60) == code
    deadline = time.monotonic() + 20
    while is_group_alive(process.pid):
        assert time.monotonic() < deadline, "a rank is still there"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("devices", "numbers"),
    [(1, [signal.SIGUSR1]), (2, [signal.SIGTERM]), (2, [signal.SIGUSR2, signal.SIGTERM])],
)
def test_the_first_rank_alone_is_asked_and_all_stop_with_a_checkpoint(
    settings, tmp_path, devices, numbers
):
    run = RunFolder(tmp_path / "run")
    options = (*LONG, f"--trainer.devices={devices}", "--checkpoint.every_steps=4")
    with started_until(
        arguments(settings, run, *options), lambda: run.newest_checkpoint() is not None
    ) as process:
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.02)
        wait_for_the_end(process, 75)
    last = max(run.steps_with_checkpoint())
    assert last % 3 == 0
    assert torch.load(run.checkpoint(last), weights_only=True)["global_step"] == last
    log = run.log.read_text()
    assert f"asked to stop ({numbers[0].name}): saving after step {last}" in log


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(settings, tmp_path):
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    options = ("--trainer.max_steps=120", "--trainer.val_check_interval=120")
    options += ("--trainer.devices=2", "--checkpoint.every_steps=10")
    done = run_command(*arguments(settings, whole, *options))
    assert done.returncode == 0, done.stderr
    stopping = arguments(settings, parts, *options, "--stop.agree_every_steps=1")
    with started_until(stopping, lambda: parts.newest_checkpoint() is not None) as process:
        process.send_signal(signal.SIGUSR1)
        wait_for_the_end(process, 75)
    assert max(parts.steps_with_checkpoint()) < 120
    done = run_command(*arguments(settings, parts, *options))
    assert done.returncode == 0, done.stderr
    first, second = (
        torch.load(run.checkpoint(120), weights_only=True)["state_dict"] for run in (whole, parts)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_signal_while_python_imports_is_remembered(settings, tmp_path):
    """Sent as soon as the handler is there, seconds before torch is."""
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "dist_siglip", *arguments(settings, run, *LONG)]
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment(),
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    caught = 1 << (signal.SIGUSR1 - 1)
    deadline = time.monotonic() + 30
    while not caught & handled(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGUSR1)
    wait_for_the_end(process, 75)
    assert run.steps_with_checkpoint() == [3]


def handled(pid):
    """The set of signals a process has handlers for, as Linux tells it."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("SigCgt")).split()[1], 16)


def children(pid):
    """Process ids of the children, in the order they were started."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_one_rank_of_torchrun_is_asked_and_both_stop(settings, tmp_path):
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "dist_siglip", *map(str, arguments(settings, run, *LONG))]
    command += ["--trainer.devices=2", "--checkpoint.every_steps=4"]
    process = subprocess.Popen(
        command,
        env=environment(),
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while run.newest_checkpoint() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(children(process.pid)[1], signal.SIGUSR1)
        assert process.wait(timeout=60) != 0  # torchrun passes no code on
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    last = max(run.steps_with_checkpoint())
    assert last % 3 == 0
    assert "asked to stop (another rank)" in run.log.read_text()


def test_a_wrong_number_is_one_line(settings, tmp_path):
    done = run_command(*arguments(settings, RunFolder(tmp_path), "--stop.agree_every_steps=0"))
    assert done.returncode == 2
    assert "stop.agree_every_steps (0) must be at least 1" in done.stderr
