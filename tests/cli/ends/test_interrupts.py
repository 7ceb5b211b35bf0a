"""Ctrl-C and a closed terminal: all ranks save and say where; a second Ctrl-C ends at once."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from dist_siglip.runs import RunFolder
from tests.support.command import REPOSITORY, environment, is_group_alive, write_settings
from tests.support.forked_runs import start

pytestmark = pytest.mark.faults
INTERRUPTED, SAVED = 130, 75


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_settings(
        tmp_path_factory.mktemp("settings"), max_steps=100_000, val_check_interval=100_000
    )


def arguments(settings, run, *options):
    agree = ["--stop.agree_every_steps=3", "--checkpoint.every_steps=4"]
    return ["fit", "--config", str(settings), f"--run_dir={run.path}", *agree, *options]


def wait_until(is_time, seconds=150):
    deadline = time.monotonic() + seconds
    while not is_time():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.02)


def said_once(text, run):
    """The one line of an interrupt; there is no traceback beside it."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if "interrupted" in line]
    assert len(lines) == 1, text
    step, path = re.search(r"interrupted at step (\d+), last checkpoint (\S+);", lines[0]).groups()
    assert path == str(run.checkpoint(max(run.steps_with_checkpoint())))
    return int(step)


def test_ctrl_c_on_a_terminal_of_two_ranks_saves_and_says_where(settings, tmp_path):
    """The whole group gets the signal: launcher, rank and loader processes."""
    run = RunFolder(tmp_path / "run")
    options = ["--trainer.devices=2", "--data.workers_per_rank=1"]
    with (tmp_path / "said").open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_siglip", *arguments(settings, run, *options)],
            stdout=file,
            stderr=file,
            env=environment(),
            cwd=REPOSITORY,
            start_new_session=True,
        )
        try:
            wait_until(lambda: run.newest_checkpoint() is not None)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=120) == INTERRUPTED
            wait_until(lambda: not is_group_alive(process.pid), 60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    last = max(run.steps_with_checkpoint())
    assert said_once((tmp_path / "said").read_text(), run) == last
    assert last % 3 == 0
    assert torch.load(run.checkpoint(last), weights_only=True)["global_step"] == last
    assert f"interrupted at step {last}" in run.log.read_text()


def test_a_closed_terminal_saves_as_a_cluster_would(settings, tmp_path):
    """The session leader gets SIGHUP, and writing to its terminal fails from then on."""
    run = RunFolder(tmp_path / "run")
    pid, terminal = pty.fork()
    if not pid:
        command = [sys.executable, "-m", "dist_siglip", *arguments(settings, run)]
        os.chdir(REPOSITORY)
        os.execvpe(sys.executable, command, environment())
    try:
        os.set_blocking(terminal, False)

        def has_saved():
            with suppress(BlockingIOError):
                os.read(terminal, 2**16)  # a full terminal would hold the bar up
            return run.newest_checkpoint() is not None

        wait_until(has_saved)
        os.close(terminal)
        ended = []
        wait_until(lambda: ended.append(os.waitpid(pid, os.WNOHANG)) or ended[-1][0] == pid, 120)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[-1][1]) == SAVED
    last = max(run.steps_with_checkpoint())
    assert f"asked to stop (SIGHUP): saving after step {last}" in run.log.read_text()


def test_a_second_ctrl_c_ends_a_rank_that_waits_for_one_that_is_stopped(settings, tmp_path):
    """Its main thread is inside of a collective and runs no handler."""
    run = RunFolder(tmp_path / "run")
    ranks = start(arguments(settings, run, "--trainer.devices=2"), tmp_path / "said", world_size=2)
    try:
        assert ranks.wait_until(lambda: run.newest_checkpoint() is not None), ranks.said()
        ranks.signal(signal.SIGSTOP, rank=1)
        step = logged_step(run)
        wait_until(lambda: logged_step(run) == (time.sleep(1) or logged_step(run)))
        ranks.signal(signal.SIGINT)
        time.sleep(1.5)  # under torchrun, what comes at once is the same Ctrl-C
        assert ranks.ranks[0].exitcode is None
        ranks.signal(signal.SIGINT)
        ranks.ranks[0].join(30)
        assert ranks.ranks[0].exitcode == INTERRUPTED, ranks.said()
    finally:
        ranks.kill()
    assert said_once(ranks.said(), run) >= step


def logged_step(run):
    return json.loads(run.metrics.read_text().splitlines()[-1])["step"]
