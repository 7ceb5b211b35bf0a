"""SIGKILL at random moments and a new start each time: the weights of an uninterrupted run.

Every start is forked from a process that has done the imports; from there on it is the command.
"""

import json
import random
import time

import pytest
import torch

from dist_siglip.runs import RunFolder
from dist_siglip.runs.checkpoints.selection import damage_of
from dist_siglip.runs.checkpoints.sharded import is_sharded, read_whole
from tests.support.command import write_settings
from tests.support.forked_runs import start

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_settings(tmp_path_factory.mktemp("kills"), val_check_interval=40)


def arguments(settings, run, steps, *more):
    return [
        "fit",
        f"--config={settings}",
        f"--run_dir={run.path}",
        f"--trainer.max_steps={steps}",
        "--data.global_batch_size=4",
        "--checkpoint.every_steps=1",
        "--checkpoint.keep_best_of=val/loss",
        *more,
    ]


def newest(run):
    return max(run.steps_with_checkpoint(), default=0)


# When to kill the starts, in turns.
MOMENTS = ("at any time", *(("after a few steps", "inside a save") * 3))


def wait_for_moment(started, run, number, draw):
    """Wait until it is time to kill a start; inside a save it stands still.

    Never after many steps: the run must not reach its end before it was killed often enough.
    """
    before, there = set(run.unfinished()), newest(run)
    moment = MOMENTS[number % len(MOMENTS)]
    if moment == "inside a save":
        goal = there + draw.randint(0, 1)
        started.catch(lambda: newest(run) >= goal and set(run.unfinished()) - before)
    elif moment == "after a few steps":
        goal = there + draw.randint(1, 3)
        assert started.wait_until(lambda: newest(run) >= goal), started.said()
    else:
        end = time.monotonic() + draw.uniform(0.0, 1.5)
        is_time = started.wait_until(lambda: time.monotonic() > end or newest(run) >= there + 4)
        assert is_time, started.said()


def content_of(run, step):
    path = run.checkpoint(step)
    assert damage_of(path) is None
    return read_whole(path) if is_sharded(path) else torch.load(path, weights_only=True)


def assert_same_bits(found, expected, where="checkpoint"):
    assert type(found) is type(expected) or isinstance(found, dict), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same_bits(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(one, other, f"{where}[{number}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def losses(run):
    lines = map(json.loads, run.metrics.read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def assert_same_end(run, reference, steps, killed_at):
    """Weights, moments, schedule and position are those of the other run, bit for bit.

    A kill between a checkpoint and the log line of its step costs that line, nothing else.
    """
    found, expected = content_of(run, steps), content_of(reference, steps)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ImageTextDataModule"):
        assert_same_bits(found[part], expected[part], part)
    curve, logged = losses(reference), losses(run)
    assert list(curve) == list(range(1, steps + 1))
    assert curve.keys() - logged.keys() <= killed_at
    assert logged == {step: curve[step] for step in logged}
    assert json.loads(run.best.read_text()) == json.loads(reference.best.read_text())


def kill_starts(command, run, times, folder, world_size=1, victim=None):
    """Start, kill, start again; return how many were killed inside a save, and all newest steps.

    Args:
        command: arguments of a start by its number.
        run: its folder.
        times: how many starts are killed.
        folder: for what they say.
        world_size: ranks of a start.
        victim: the rank that is killed by the number of the start; all at once where null.
    """
    draw = random.Random(20261121)
    inside_saves, killed_at = 0, set()
    for number in range(times):
        left = set(run.unfinished())
        started = start(command(number), folder / f"{number}.txt", world_size)
        wait_for_moment(started, run, number, draw)
        rank = victim(number) if victim else None
        started.kill(rank)
        codes = started.wait()
        assert 0 not in codes, started.said()
        inside_saves += bool(set(run.unfinished()) - left)
        killed_at.add(newest(run))
    return inside_saves, killed_at


def test_random_kills_cost_nothing(settings, tmp_path, capsys, is_full):
    """Fifty with ``--full``, otherwise five; every second start writes in the background."""
    num_kills, steps = (50, 150) if is_full else (5, 30)
    reference, run = RunFolder(tmp_path / "reference"), RunFolder(tmp_path / "run")
    uninterrupted = start(arguments(settings, reference, steps), tmp_path / "reference.txt")

    def command(number):
        asynchronous = f"--checkpoint.asynchronous={str(number % 2 == 0).lower()}"
        return arguments(settings, run, steps, asynchronous)

    inside_saves, killed_at = kill_starts(command, run, num_kills, tmp_path)
    reached = newest(run)
    assert 0 < reached < steps
    # Those that were stopped inside one for sure; others by chance.
    assert inside_saves >= 3 * (num_kills // 7) + (num_kills % 7) // 2 >= 2
    finished = start(arguments(settings, run, steps), tmp_path / "last.txt")
    assert finished.wait() == [0], finished.said()
    assert uninterrupted.wait() == [0], uninterrupted.said()
    assert_same_end(run, reference, steps, killed_at)
    with capsys.disabled():
        print(f"{num_kills} kills, {inside_saves} inside a save, at step {reached} of {steps}")


SHARDED = [
    "--trainer.strategy=dist_siglip.training.strategies.FullyShardedStrategy",
    "--trainer.strategy.checkpoint=sharded",
]


@pytest.mark.parametrize("more", [[], SHARDED], ids=["DDP", "FSDP2 to folders"])
def test_kills_of_one_or_both_of_two_ranks_cost_nothing(settings, more, tmp_path, is_full):
    """Killed are both ranks, the second, the first, in turns; the one that is left ends too."""
    num_kills, steps = (6, 24) if is_full else (3, 16)
    reference, run = RunFolder(tmp_path / "reference"), RunFolder(tmp_path / "run")
    more = ["--trainer.devices=2", *more]
    uninterrupted = start(arguments(settings, reference, steps, *more), tmp_path / "r.txt", 2)
    assert uninterrupted.wait() == [0, 0], uninterrupted.said()

    def command(number):
        asynchronous = f"--checkpoint.asynchronous={str(number % 2 == 0).lower()}"
        return arguments(settings, run, steps, asynchronous, *more)

    victims = (None, 1, 0)
    inside_saves, killed_at = kill_starts(
        command, run, num_kills, tmp_path, 2, lambda number: victims[number % 3]
    )
    assert inside_saves >= 1  # the third kill: of the first rank, which writes
    assert 0 < newest(run) < steps
    finished = start(arguments(settings, run, steps, *more), tmp_path / "last.txt", 2)
    assert finished.wait() == [0, 0], finished.said()
    assert_same_end(run, reference, steps, killed_at)
