"""Signals to one rank: all ranks end at the same step, with one checkpoint, and can go on."""

import os
import signal

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.system import signals
from dist_siglip.training.callbacks import Preemption
from dist_siglip.training.callbacks.preemption import requeue_job
from tests.support.processes import run_ranks
from tests.support.stop_ranks import train_alone, train_at_each_moment, train_with_objective
from tests.support.tiny_models import ARCHITECTURES, write_config

# The boundary after each: agreed every 3 steps, evaluated at 6 and 12, saved at 5 and 10.
BOUNDARIES = {"setup": 3, "step": 6, "evaluation": 9, "save": 6, "before the gradients meet": 6}


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "siglip.json", ARCHITECTURES["siglip"])


@pytest.mark.faults
@pytest.mark.parametrize(
    ("world_size", "moments"), [(2, [*BOUNDARIES]), (3, ["before the gradients meet"])]
)
def test_three_signals_to_one_rank_stop_all_at_the_next_boundary(
    model, tmp_path, world_size, moments
):
    """USR1, USR2 and TERM at once, at five moments; the last run goes on to the same weights."""
    ranks = run_ranks(
        train_at_each_moment, world_size, model, str(tmp_path), moments, world_size - 1
    )
    for moment in moments:
        step = BOUNDARIES[moment]
        for found in (each[moment] for each in ranks):
            assert (found["has_stopped"], found["step"]) == (True, step), moment
            assert found["checkpoints"][-1] == step, moment
            # The evaluation due at step 6 waits for the next start, unless it was there before.
            assert found["evaluated"] == ([6] if step > 6 else []), moment
    for found in ranks:
        assert not found["never"]["has_stopped"]
        assert found["never"]["step"] == 12
        assert found["never"]["evaluated"] == [6, 12]
    never, resumed = ranks[0]["never"]["weights"], ranks[0]["resumed"]["weights"]
    assert all(torch.equal(never[name], resumed[name]) for name in never)


@pytest.mark.faults
def test_runs_stopped_around_the_beginning_of_an_objective_go_on_to_the_bit(model, tmp_path):
    """It begins at step 6 of 12 and rises over 4: stopped before, there, and on the rise."""
    moments = {"setup": 3, "step": 6, "evaluation": 9}
    objective = {"start": 0.5, "ramp_steps": 4, "parallel": 0.5}
    ranks = run_ranks(train_with_objective, 2, model, str(tmp_path), [*moments], objective)
    for found in ranks:
        never = found[None]
        assert not never["has_stopped"]
        assert never["metrics"]["val/caption_loss"] > 0
        for moment, step in moments.items():
            assert found[moment]["stopped"] == step, moment
            assert found[moment]["metrics"] == never["metrics"], moment
            weights = found[moment]["weights"]
            assert weights.keys() == never["weights"].keys()
            for name, value in never["weights"].items():
                assert torch.equal(weights[name], value), (moment, name)


def test_ranks_that_do_not_agree_lose_each_other(model, tmp_path):
    """The same test body notices a callback that stops one rank alone."""
    found = run_ranks(train_alone, 2, model, str(tmp_path), timeout_seconds=5)
    assert found == ["lost", "lost"]


def test_a_signal_outside_of_a_run_keeps_its_effect():
    before = signal.getsignal(signal.SIGUSR1)
    with signals.listening():
        assert signal.getsignal(signal.SIGUSR1) is not before
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_first_signal_is_the_one_that_is_named():
    with signals.listening():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.received() == "SIGTERM"
    assert signals.received() is None


def test_ctrl_c_ends_at_once_where_there_is_nothing_to_save_and_waits_where_there_is():
    with signals.listening():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signals.end_saving()
    with signals.listening():
        signals.begin_saving()
        signal.raise_signal(signal.SIGINT)
        assert signals.is_interrupted()
        signal.raise_signal(signal.SIGTERM)
        assert not signals.is_interrupted()  # a cluster wants the run to go on
    assert not signals.is_interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_under_nohup_stays_deaf_to_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert signals.received() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_process_does_not_write_into_the_ear_of_its_parent():
    with signals.listening():
        pid = os.fork()
        if not pid:
            os._exit(signal.set_wakeup_fd(-1) != -1)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_deaf_process_stays_deaf():
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    try:
        with signals.listening():
            signals.ignore()
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_agreeing_takes_at_least_one_step():
    with pytest.raises(UserError, match=r"agree_every_steps \(0\) must be at least 1"):
        Preemption(agree_every_steps=0)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A SLURM that writes down what it is asked, and fails if told to."""
    for name, answer in (("scontrol", ""), ("squeue", "echo ${SQUEUE_STATE:-RUNNING}")):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/asked\n{answer}\nexit ${{SLURM_CODE:-0}}\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return lambda: (tmp_path / "asked").read_text().splitlines()


def test_a_job_of_an_array_is_requeued_by_its_number_in_the_array(asked, monkeypatch):
    assert requeue_job()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue_job()
    assert [line for line in asked() if "requeue" in line] == [
        "scontrol requeue 12",
        "scontrol requeue 10_3",
    ]


def test_a_job_that_was_cancelled_is_not_brought_back_to_life(asked, monkeypatch):
    monkeypatch.setenv("SQUEUE_STATE", "COMPLETING")
    assert not requeue_job()
    assert asked() == ["squeue --noheader --job 12 --format=%T"]


def test_a_job_that_cannot_be_requeued_is_a_warning(asked, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_CODE", "1")
    assert not requeue_job()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not requeue_job()
    told = [record.message for record in caplog.records]
    assert "job 12 was not requeued" in told[0]
    assert "outside of SLURM" in told[1]
