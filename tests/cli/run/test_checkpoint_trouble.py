"""Checkpoints that a disk has hurt, and a disk that takes no checkpoint, as a user meets them."""

import resource
import time

import pytest
import torch

from dist_siglip.runs import RunFolder
from tests.support.command import write_settings
from tests.support.forked_runs import start
from tests.support.processes import LIMIT_SECONDS

pytestmark = pytest.mark.faults

ROOM = resource.RLIM_INFINITY
SHARDED = (
    "--trainer.strategy=dist_siglip.training.strategies.FullyShardedStrategy",
    "--trainer.strategy.checkpoint=sharded",
)
NO_ROOM = 1 << 20  # bytes of a file; a checkpoint has six times as many


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_settings(
        tmp_path_factory.mktemp("trouble"), val_check_interval=1000, limit_val_batches=0
    )


def fit(settings, run, steps, log, *more, world_size=1, command="fit"):
    every = more if command == "validate" else ("--checkpoint.every_steps=4", *more)
    arguments = [
        command,
        f"--config={settings}",
        f"--run_dir={run.path}",
        f"--trainer.devices={world_size}",
        f"--trainer.max_steps={steps}",
        "--data.global_batch_size=4",
        *every,
    ]
    return start(arguments, log, world_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def weights(run, step):
    return torch.load(run.checkpoint(step), weights_only=True)["state_dict"]


def test_a_flipped_bit_costs_the_steps_since_the_checkpoint_before_and_no_more(settings, tmp_path):
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other")
    log = tmp_path / "log.txt"
    assert fit(settings, run, 8, log).wait() == [0]
    flip(run.checkpoint(8))
    again = fit(settings, run, 8, log)
    assert again.wait() == [0], again.said()
    assert "step=00000008.ckpt is damaged (its bytes have another checksum" in again.said()
    assert f"going on from {run.checkpoint(4)}" in again.said()
    whole = fit(settings, other, 8, log)
    assert whole.wait() == [0]
    for name, value in weights(other, 8).items():
        assert torch.equal(weights(run, 8)[name], value), name


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2 to folders"])
def test_two_ranks_go_on_from_the_checkpoint_before_and_one_of_them_verifies(
    settings, tmp_path, sharded
):
    run, log = RunFolder(tmp_path / "run"), tmp_path / "log.txt"
    more = SHARDED if sharded else ()
    assert fit(settings, run, 8, log, *more, world_size=2).wait() == [0, 0]
    flip(run.checkpoint(8) / "__1_0.distcp" if sharded else run.checkpoint(8))
    again = fit(settings, run, 8, log, *more, world_size=2)
    assert again.wait() == [0, 0], again.said()
    assert again.said().count("step=00000008.ckpt is damaged") == 1, again.said()
    assert f"going on from {run.checkpoint(4)}" in again.said()


def test_damage_that_nothing_can_be_made_of_is_one_line(settings, tmp_path):
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other")
    assert fit(settings, run, 4, tmp_path / "0.txt").wait() == [0]
    flip(run.checkpoint(4))
    for number, (folder, more, command, text) in enumerate(
        (
            (run, (), "fit", "has 1 checkpoints and all are damaged"),
            (run, (), "validate", "has 1 checkpoints and all are damaged"),
            (other, (f"--ckpt_path={run.checkpoint(4)}",), "fit", "another checksum"),
            (other, (f"--ckpt_path={run.checkpoint(4)}",), "validate", "another checksum"),
        ),
        start=1,
    ):
        started = fit(settings, folder, 8, tmp_path / f"{number}.txt", *more, command=command)
        assert started.wait() == [2], started.said()
        assert text in started.said().splitlines()[-1]
        assert "Traceback" not in started.said()
    assert not other.path.exists()


def wait_for(text, started, times=1, seconds=LIMIT_SECONDS):
    deadline = time.monotonic() + seconds
    while started.said().count(text) < times:
        assert all(rank.exitcode is None for rank in started.ranks), started.said()
        assert time.monotonic() < deadline, started.said()
        time.sleep(0.01)


def limit(started, rank, num_bytes):
    resource.prlimit(started.ranks[rank].pid, resource.RLIMIT_FSIZE, (num_bytes, ROOM))


@pytest.mark.parametrize(
    ("more", "victim"),
    [((), 0), (("--checkpoint.asynchronous=true",), 0), (SHARDED, 1)],
    ids=["DDP", "in the background", "FSDP2 to folders"],
)
def test_two_ranks_go_on_where_one_cannot_write_and_try_again(settings, more, victim, tmp_path):
    """The kernel refuses files of this size to one rank for two checkpoints."""
    run = RunFolder(tmp_path / "run")
    more = (*more, "--checkpoint.allowed_misses=1000")
    started = fit(settings, run, 400, tmp_path / "log.txt", *more, world_size=2)
    wait_for("training from step", started)
    limit(started, victim, NO_ROOM)
    wait_for("was not written", started, times=2)
    limit(started, victim, ROOM)
    refused = max(run.steps_with_checkpoint(), default=0)
    deadline = time.monotonic() + LIMIT_SECONDS
    while max(run.steps_with_checkpoint(), default=0) <= refused:
        assert time.monotonic() < deadline, started.said()
        time.sleep(0.01)
    assert f"({'rank 1: ' * victim}File too large); " in started.said()
    assert not [path for path in run.unfinished() if path.suffix == ".old"]
    started.kill()
    assert started.wait() == [-9, -9]


def test_two_ranks_end_with_code_3_when_too_many_are_missed(settings, tmp_path):
    run = RunFolder(tmp_path / "run")
    more = "--checkpoint.allowed_misses=1"
    started = fit(settings, run, 400, tmp_path / "log.txt", more, world_size=2)
    wait_for("training from step", started)
    limit(started, 0, NO_ROOM)
    assert started.wait() == [3, 3], started.said()
    assert "2 checkpoints in a row could not be written" in started.said()
    assert "(File too large)" in started.said()
    assert "Traceback" not in started.said()
