"""A run folder that is copied, renamed, or damaged; a first rank that is killed."""

import json
import os
import shutil
import time
from contextlib import suppress

import pytest
import yaml

from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked, start

pytestmark = pytest.mark.faults
SHORTER_OR_LONGER = "--model.optim.accept_rate_jump=true"
LONG = ("--trainer.max_steps=100000", "--trainer.val_check_interval=100000")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("base")
    settings = write_settings(folder, max_steps=4, val_check_interval=4)
    done = run_forked("fit", "--config", settings)
    assert done.returncode == 0, done.stderr
    return RunFolder(folder / "run")


@pytest.fixture
def settings(base):
    return base.path.parent / "settings.yaml"


def content(run):
    return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_a_copied_run_goes_on_in_the_copy(base, tmp_path):
    copy, before = RunFolder(tmp_path / "copy"), content(base)
    shutil.copytree(base.path, copy.path)
    done = run_forked("fit", "--config", copy.config, "--trainer.max_steps=6", SHORTER_OR_LONGER)
    assert done.returncode == 0, done.stderr
    assert copy.steps_with_checkpoint() == [4, 6]
    assert f"run_dir is {copy.path}, the folder of the configuration" in done.stderr
    assert content(base) == before
    assert yaml.safe_load(copy.config.read_text())["run_dir"] == str(copy.path)


def test_a_run_goes_on_past_what_it_does_not_need(base, tmp_path):
    """A flipped bit, a slip, pipes and folders; on two ranks, none of which waits."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(base.path, run.path)
    shutil.rmtree(run.evaluation / "history")
    text = (run.evaluation / "metrics.json").read_bytes()
    (run.evaluation / "metrics.json").write_bytes(text[:9] + bytes([text[9] ^ 128]) + text[10:])
    run.config.write_text("model: {slip\n")
    for path in (run.metrics, run.provenance, run.best, run.log, run.report, run.checkpoint(2)):
        path.unlink(missing_ok=True)
    for path in (run.metrics, run.best, run.skipped_steps, run.bad_samples, run.checkpoint(5)):
        os.mkfifo(path)
    for path in (run.provenance, run.log, run.report, run.evaluation / "history"):
        path.mkdir()
    settings = base.path.parent / "settings.yaml"
    options = ["--run_dir", run.path, "--trainer.max_steps=6", "--trainer.devices=2"]
    done = run_forked("fit", "--config", settings, *options, world_size=2)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for told in ("metrics.json cannot be read", "config.yaml cannot be read", "is a pipe"):
        assert told in done.stderr
    assert json.loads((run.evaluation / "metrics.json").read_text())["step"] == 6
    assert yaml.safe_load(run.config.read_text())["model"]
    assert 6 in run.steps_with_checkpoint()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_folder_that_is_renamed_ends_the_run(settings, tmp_path, world_size):
    """One line; the folder is whole under its new name, and nothing comes under the old one."""
    old, new = RunFolder(tmp_path / "old"), RunFolder(tmp_path / "new")
    options = ["--run_dir", old.path, *LONG, f"--trainer.devices={world_size}"]
    run = start(["fit", "--config", settings, *options], tmp_path / "said.txt", world_size)
    assert run.wait_until(lambda: old.newest_checkpoint() is not None), run.said()
    old.path.rename(new.path)
    if world_size == 1:
        old.path.mkdir()  # somebody begins something else there
    codes = run.wait()
    assert codes[0] == 73, run.said()
    assert 0 not in codes
    (line,) = [line for line in run.said().splitlines() if "moved" in line]
    assert f"was moved away while the run went on to {new.path}; start again" in line
    assert "cannot be written" not in run.said()
    assert "Traceback" not in run.said()
    assert not old.path.exists() or not list(old.path.iterdir())
    steps = [json.loads(line)["step"] for line in new.metrics.read_text().splitlines()]
    assert steps == list(range(1, steps[-1] + 1))
    more = ["--run_dir", new.path, f"--trainer.max_steps={steps[-1] + 2}", SHORTER_OR_LONGER]
    again = run_forked("fit", "--config", settings, *more)
    assert again.returncode == 0, again.stderr


def test_a_killed_first_rank_leaves_no_claim_behind(settings, tmp_path):
    """Its loader workers outlive it for a while; one that is stopped stays for good."""
    folder = RunFolder(tmp_path / "run")
    options = ["--run_dir", folder.path, *LONG, "--data.workers_per_rank=2"]
    run = start(["fit", "--config", settings, *options], tmp_path / "said.txt")
    assert run.wait_until(lambda: folder.newest_checkpoint() is not None), run.said()
    with pytest.raises(UserError, match="in use by another process;"):
        folder.lock()
    first = run.ranks[0].pid
    worker = children_of(first)[0]
    os.kill(worker, 19)  # SIGSTOP: as one that waits for a file server
    os.kill(first, 9)
    try:
        # The claim goes when the last thread of the process has.
        latest = time.monotonic() + 30
        while not (is_free := can_be_claimed(folder)) and time.monotonic() < latest:
            time.sleep(0.05)
        os.kill(worker, 0)  # it is there
        assert is_free
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, 9)


def can_be_claimed(folder):
    try:
        folder.lock().release()
    except UserError:
        return False
    return True


def children_of(pid):
    """Processes that a living process has started."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except FileNotFoundError:
        return []
