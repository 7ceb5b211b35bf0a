"""A lock belongs to the process that took it, on every kind of file system."""

import errno
import fcntl
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from dist_siglip.system import process_lock
from dist_siglip.system import process_lock as owner_file
from dist_siglip.system.process_lock import (
    LockHeldError,
    MovedError,
    ProcessLock,
    check_place,
    hold,
)
from tests.support.faults import in_fork

FORK = multiprocessing.get_context("fork")
NO_LOCKS = ["ENOSYS", "ENOLCK", "ENOTSUP", "EINVAL"]


def can_take(path):
    """Whether another process gets the lock."""

    def work():
        ProcessLock(str(path)).release()

    return in_fork(work) == 0


@pytest.fixture(params=["locks", "no locks"])
def kind(request, monkeypatch):
    """A file system with locks, and one without."""
    if request.param == "no locks":
        without_locks(monkeypatch, errno.ENOSYS)
    return request.param


def without_locks(monkeypatch, code):
    def lockf(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(process_lock.fcntl, "lockf", lockf)
    monkeypatch.setattr(owner_file, "_SETTLE_SECONDS", 0.0)


def test_others_get_it_after_the_holder_let_go(tmp_path, kind):
    path = tmp_path / ".lock"
    with ProcessLock(str(path)):
        assert not can_take(path)
        with pytest.raises(LockHeldError):
            ProcessLock(str(path))
        with ProcessLock(str(path), "another name"):
            pass
    assert can_take(path)
    with ProcessLock(str(path)):
        assert not can_take(path)


def test_a_child_of_a_killed_holder_does_not_keep_it(tmp_path, kind):
    """As the loader workers of a run whose first rank is killed, one of them stuck."""
    path, started = tmp_path / ".lock", FORK.Event()

    def holder():
        lock = ProcessLock(str(path))
        child = os.fork()
        if child == 0:
            time.sleep(60)
        (tmp_path / "child").write_text(str(child))
        started.set()
        time.sleep(60)
        lock.release()

    process = FORK.Process(target=holder)
    process.start()
    assert started.wait(30)
    assert not can_take(path)
    process.kill()
    child = int((tmp_path / "child").read_text())
    try:
        latest = time.monotonic() + 30
        while not can_take(path) and time.monotonic() < latest:
            time.sleep(0.01)
        os.kill(child, 0)  # it is there
        assert can_take(path)
    finally:
        os.kill(child, signal.SIGKILL)
    process.join(30)


def test_a_lock_of_flock_would_stay_with_the_child(tmp_path):
    """What the test above would find if the lock were not of one process."""
    with (tmp_path / "flock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        child = os.fork()
        if child == 0:
            time.sleep(60)
    try:
        with (tmp_path / "flock").open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_opening_and_closing_the_lock_elsewhere_does_not_drop_it(tmp_path):
    path = tmp_path / ".lock"
    (tmp_path / "link").symlink_to(tmp_path)
    with ProcessLock(str(path)):
        with pytest.raises(LockHeldError):
            ProcessLock(str(tmp_path / "link" / ".lock"))
        with ProcessLock(str(tmp_path / "link" / ".lock"), "another name"):
            pass
        assert not can_take(path)


@pytest.mark.parametrize("code", NO_LOCKS)
def test_a_file_system_without_locks_is_told_once(tmp_path, monkeypatch, caplog, code):
    without_locks(monkeypatch, getattr(errno, code))
    for _ in range(2):
        with ProcessLock(str(tmp_path / ".lock")):
            assert not can_take(tmp_path / ".lock")
    assert len(caplog.messages) == 1
    assert f"the file system of {tmp_path} has no locks" in caplog.messages[0]
    assert not process_lock.has_locks(str(tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "other"]


def test_another_failure_to_lock_is_told(tmp_path, monkeypatch):
    without_locks(monkeypatch, errno.EIO)
    for attempt in (ProcessLock, process_lock.has_locks):
        with pytest.raises(OSError, match="Input/output error"):
            attempt(str(tmp_path / ".lock"))


def owner_of(path):
    (found,) = [each for each in path.parent.iterdir() if each.name.startswith(f"{path.name}.")]
    return found


@pytest.mark.parametrize(
    ("change", "is_taken_over"),
    [
        ({}, False),
        ({"pid": 2**22 + 1}, True),
        ({"started": "0"}, True),  # the number was given to another process
        ({"machine": "other"}, False),
        ({"machine": "other", "job": "7", "restart": "0"}, True),
        ({"machine": "other", "job": "8", "restart": "0"}, False),
    ],
)
def test_a_file_in_place_of_a_lock_is_taken_over_when_its_process_ended(
    tmp_path, monkeypatch, change, is_taken_over
):
    without_locks(monkeypatch, errno.ENOSYS)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path = tmp_path / ".lock"
    with ProcessLock(str(path)):
        owner = owner_of(path)
        owner.write_text(json.dumps(json.loads(owner.read_text()) | change))
        assert can_take(path) == is_taken_over
    if change.get("machine") == "other" and not is_taken_over:
        old = time.time() - 2 * owner_file._SILENT_SECONDS
        os.utime(owner, (old, old))
        assert can_take(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_a_file_in_place_of_a_lock_that_says_nothing_counts_for_a_while(
    tmp_path, monkeypatch, content
):
    without_locks(monkeypatch, errno.ENOSYS)
    path = tmp_path / ".lock"
    with ProcessLock(str(path)):
        owner = owner_of(path)
        owner.write_bytes(content)
        assert not can_take(path)
        os.utime(owner, (0, 0))
        assert can_take(path)


def test_nothing_but_a_file_of_its_own_is_locked(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "dangling", "pipe", "folder"):
        with pytest.raises(OSError):  # noqa: PT011 - each has a number of its own
            ProcessLock(str(tmp_path / name))
    assert (tmp_path / "precious").read_text() == "mine"
    with ProcessLock(str(tmp_path / "precious")):
        assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_the_wait_ends_when_the_holder_makes_no_progress(tmp_path):
    path, looks = str(tmp_path / ".lock"), []

    def progress():
        looks.append(len(looks))
        return min(len(looks), 3)

    with ProcessLock(path):
        with (
            pytest.raises(TimeoutError, match=r"another thread held the lock for 0 s"),
            hold(path, "", 0.01, progress),
        ):
            pass
        assert len(looks) > 3
        script = f"from dist_siglip.system.process_lock import *\nwith hold({path!r}, '', 0): pass"
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert "another process held the lock" in other.stderr


def test_a_lock_file_that_was_removed_is_made_again(tmp_path):
    path = tmp_path / ".lock"
    first = ProcessLock(str(path))
    path.unlink()
    with ProcessLock(str(path)):
        assert not can_take(path)
    first.release()


def test_nothing_is_written_where_a_claimed_folder_was(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    with ProcessLock(str(old / ".lock")) as lock:
        lock.watch()
        check_place(old / "checkpoints" / "a")
        (old / ".lock").unlink()
        (old / ".lock").touch()
        check_place(old / "a")  # only the file was replaced
        old.rename(new)
        for make in (lambda: None, old.mkdir):
            make()
            assert not lock.is_in_place()
            with pytest.raises(MovedError, match="old was moved away"):
                check_place(old / "checkpoints" / "a")
            check_place(tmp_path / "older" / "a")
            check_place(new / "a")
        assert in_fork(lambda: check_place(old / "a")) == 0  # a child has claimed nothing
    check_place(old / "a")


def test_a_watched_lock_that_nobody_has_any_more_is_given_back(tmp_path):
    """A second start in one process, after the first one's objects are gone."""
    lock = ProcessLock(str(tmp_path / ".lock"))
    lock.watch()
    assert not can_take(tmp_path / ".lock")
    del lock
    gc.collect()
    assert can_take(tmp_path / ".lock")
    ProcessLock(str(tmp_path / ".lock")).release()


def test_the_place_of_a_moved_folder_is_named(tmp_path):
    (tmp_path / "old").mkdir()
    with ProcessLock(str(tmp_path / "old" / ".lock")) as lock:
        (tmp_path / "old").rename(tmp_path / "new")
        assert lock.place_now() == str(tmp_path / "new")
        (tmp_path / "new" / ".lock").unlink()
        assert lock.place_now() is None
