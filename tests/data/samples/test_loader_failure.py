"""Loader processes that die or fail: the run ends in seconds, and one line says which and why."""

import re
import resource

import pytest

from dist_siglip.data.index.pairs import Span
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.loader import (
    PairLoader,
    failed_to_deliver,
    loader_failure,
    prepare_worker,
)
from dist_siglip.errors import LoaderError, RunFailedError, UserError
from tests.support import starved_loaders
from tests.support.command import write_settings
from tests.support.forked_runs import start
from tests.support.processes import run_ranks
from tests.support.shards import write_shards
from tests.training.datamodule.test_datamodule import make_data

LOADER = 71
STAGES = "tests.support.starved_loaders"


@pytest.mark.parametrize(
    ("text", "told", "remedy"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory.",
            r"loader process \(pid 7\) was killed by signal: Bus error",
            r"/dev/shm.*--shm-size",
        ),
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            r"loader process \(pid 7\) was killed by signal: Killed",
            "if memory ran out",
        ),
        (
            "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
            r"loader process \(pid 7, 8\) ended unexpectedly",
            "if memory ran out",
        ),
        (
            "Caught OSError in DataLoader worker process 1.\nOriginal Traceback (most recent ...\n"
            "OSError: [Errno 24] Too many open files",
            r"loader process 1 failed: OSError: \[Errno 24\]",
            "ulimit -n",
        ),
        (
            "Caught ConnectionResetError in DataLoader worker process 0.\nTraceback ...\n"
            "ConnectionResetError: [Errno 104] Connection reset by peer",
            "loader process 0 failed: ConnectionResetError",
            "the process hung up: it was killed, perhaps for memory",
        ),
        (
            "Caught KeyError in DataLoader worker process 0.\nTraceback:\n  File stage.py\n"
            "KeyError: 'x'",
            "loader process 0 failed: KeyError: 'x'",
            "File stage.py",
        ),
    ],
)
def test_what_torch_says_becomes_one_line_with_a_remedy(text, told, remedy):
    error = RuntimeError("something else failed")
    error.__cause__ = RuntimeError(text)
    failure = loader_failure(error)
    assert isinstance(failure, LoaderError)
    assert re.search(f"^{told}.*; .*{remedy}", str(failure)), failure


def test_a_mistake_of_the_user_in_a_loader_process_stays_one():
    for kind in (UserError, RunFailedError):
        text = "Caught E in DataLoader worker process 0.\nTraceback ...\na.b.E: stages (x) is wrong"
        found = loader_failure(kind(text))
        assert (type(found), str(found)) == (kind, "stages (x) is wrong")


def test_other_errors_are_not_blamed_on_loader_processes():
    assert loader_failure(RuntimeError("CUDA error")) is None
    assert "ulimit -n" in str(failed_to_deliver("OSError: [Errno 24] Too many open files"))


def failure_of(batches):
    """What the loader of this process fails with."""
    try:
        for number, _ in enumerate(batches):
            assert number < 40
    except LoaderError as error:
        return str(error)
    return "it delivers"


def read_with_a_stage(rank, world_size, shards, stage):
    """Read training batches through a stage."""
    data = make_data(shards, workers_per_rank=1, stages=[getattr(starved_loaders, stage)])
    data.setup("fit")
    return failure_of(data.train_dataloader())


def read_without_files(rank, world_size):
    """Read items of a process that may open no file."""
    items = starved_loaders.NoFiles()
    return failure_of(
        PairLoader(items, batch_size=None, num_workers=1, worker_init_fn=prepare_worker)
    )


def fetch_without_files(rank, world_size, shard):
    """Open a shard where no file may be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, before[1]))
    try:
        ShardReader().read(Span(shard, 0, 4))
    except OSError as error:
        return f"[Errno {error.errno}] {error.strerror}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    return "read"


def starve(rank, world_size, shards):
    """One loader process after another comes to its end; what is said of each."""
    return {
        "no files": read_without_files(rank, world_size),
        "no files for a shard": fetch_without_files(rank, world_size, shards[0]),
        "killed": read_with_a_stage(rank, world_size, shards, "killed_on_rank_1"),
        "defective": read_with_a_stage(rank, world_size, shards, "defective"),
    }


@pytest.mark.faults
def test_loader_processes_in_need_are_named_and_not_waited_for(tmp_path):
    """Without a file to hand a batch over in one lives on, and was waited for half an hour.

    In a child process: its limits must not outlive the test.
    """
    shards = write_shards(tmp_path)
    (said,) = run_ranks(starve, 1, shards)
    assert (
        "a batch could not be handed over: RuntimeError: unable to open shared " in said["no files"]
    )
    assert "Too many open files (24); raise the limit of open files" in said["no files"]
    # Nor is any sample bad for it.
    assert said["no files for a shard"] == "[Errno 24] Too many open files"
    # torch sees the signal only if it is the first to hear of the end.
    ends = "was killed by signal: Killed|ended unexpectedly; if mem|hung up: it was killed, perhaps"
    assert re.search(ends, said["killed"])
    assert "loader process 0 failed: RuntimeError: stage " in said["defective"]


@pytest.mark.faults
def test_both_ranks_end_with_one_code_when_a_loader_process_of_one_is_killed(tmp_path):
    settings = write_settings(tmp_path, max_steps=1000, val_check_interval=1000)
    options = ["--data.workers_per_rank=1", "--trainer.devices=2"]
    options += [f"--data.stages=[{STAGES}.killed_on_rank_1]"]
    ranks = start(["fit", "--config", settings, *options], tmp_path / "said", world_size=2)
    assert ranks.wait() == [LOADER, LOADER], ranks.said()
    assert "[rank 1] dist-siglip: failed: loader process" in ranks.said()
    assert "Traceback" not in ranks.said()
