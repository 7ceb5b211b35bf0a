"""Locks that belong to one process and end with it.

POSIX record locks on a lock file, a byte for each name. The system drops them when a process ends,
however it ends, and a forked process does not inherit them: a lock of ``flock`` would stay held by
every loader process that was forked meanwhile, also after its parent was killed. They do not keep
the threads of a process apart, so each name has a lock of the process besides; and closing any
descriptor of the file would drop them all, so there is one descriptor per process and file, never
closed. A lock file is never followed through a link, never cut, never read or written.

Where the file system has no locks, a file beside the lock file takes their place. It names the
process that made it, and is taken over once that process is known to have ended: on the same
machine the system tells; from another machine, a file that was not touched for an hour counts as
left behind, and one of a job that SLURM has started anew as well.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

logger = logging.getLogger(__name__)

_SILENT_SECONDS = 3600.0
_TOUCH_SECONDS = 60.0
_SETTLE_SECONDS = 0.2


class LockHeldError(Exception):
    """Another process, or another part of this one, holds the lock; the text names it."""


class OwnerFile:
    """A file that stands for a lock where there are none, and names the process that made it.

    Args:
        path: made by this process alone, or not at all.

    Raises:
        LockHeldError: if another process made it and may still be there.
        OSError: if it cannot be made.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._content = json.dumps(_this_process() | {"token": uuid4().hex}).encode()
        self._touched = time.monotonic()
        if self._make():
            return
        self._refuse_living()
        with suppress(FileNotFoundError):
            os.unlink(path)
        if not self._make():
            raise LockHeldError("another process")
        time.sleep(_SETTLE_SECONDS)  # another one may have found the same file left behind
        if _read(path) != self._content:
            raise LockHeldError("another process")

    def _make(self) -> bool:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(self.path, flags, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._content)
        finally:
            os.close(descriptor)
        return True

    def _refuse_living(self) -> None:
        """Raise unless the process that made the file has ended."""
        try:
            age = time.time() - os.lstat(self.path).st_mtime
            owner: Any = json.loads(_read(self.path) or b"null")
        except FileNotFoundError:
            return
        except ValueError:
            owner = None
        this = _this_process()
        if isinstance(owner, dict) and owner.get("machine") == this["machine"]:
            if owner.get("started") != _start_of(owner.get("pid")):
                return
            raise LockHeldError(f"process {owner.get('pid')}")
        whose = owner if isinstance(owner, dict) else {}
        is_same_job = bool(whose.get("job")) and whose.get("job") == this["job"]
        if is_same_job and whose.get("restart") != this["restart"]:  # SLURM started it anew
            return
        if age > _SILENT_SECONDS:
            return
        raise LockHeldError(
            f"process {whose.get('pid', '?')} of {whose.get('host', 'another machine')} "
            f"(if it has ended, remove {self.path})"
        )

    def touch(self) -> None:
        """Show now and then that this process is there."""
        if time.monotonic() - self._touched > _TOUCH_SECONDS:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)

    def remove(self) -> None:
        """Let go, unless another one has taken over."""
        with suppress(OSError):
            if _read(self.path) == self._content:
                os.unlink(self.path)


def _this_process() -> dict[str, object]:
    return {
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _machine() -> str:
    """Name where a process number means the same process: this boot, this set of processes."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _start_of(pid: object) -> str | None:
    """When a process was started, in some unit; None if it is not there."""
    if not isinstance(pid, int) or pid < 1:
        return None
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
            return None if fields[0] in "ZX" else fields[19]  # ended, and nobody has asked how
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except PermissionError:
        return "there"
    except OSError:
        return None
    return "there"


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


_POLL_SECONDS = 0.05
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})


class MovedError(OSError):
    """The folder of a watched lock was moved away, or replaced."""


class _Process:
    """The descriptors and thread locks of one process, and the locks whose place is watched."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.descriptors: dict[str, int] = {}
        self.threads: dict[tuple[int, int, int], threading.Lock] = {}
        self.watched: WeakValueDictionary[str, ProcessLock] = WeakValueDictionary()


_PROCESS = [_Process()]  # the last one is of this process
os.register_at_fork(after_in_child=lambda: _PROCESS.append(_Process()))


class ProcessLock:
    """A lock that this process holds until ``release``, or until it ends.

    Args:
        file: the lock file; made if it is missing.
        name: what is locked; a file has as many locks as there are names.
        mode: rights of a new lock file.

    Raises:
        LockHeldError: if it is held.
        OSError: if the file cannot be opened, or is a link or no regular file.
    """

    def __init__(self, file: str, name: str = "", mode: int = 0o666) -> None:
        self.file = os.path.abspath(file)
        self._place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        self._is_held = False
        self._process = process = _PROCESS[-1]
        with process.guard:
            self._descriptor = _open_once(process, self.file, mode)
            found = os.fstat(self._descriptor)
            key = (found.st_dev, found.st_ino, self._place)
            self._thread = process.threads.setdefault(key, threading.Lock())
        self._owner_file: OwnerFile | None = None
        self._take()
        folder = os.stat(os.path.dirname(self.file))
        self._folder = (folder.st_dev, folder.st_ino)

    def __enter__(self) -> "ProcessLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_is_held", False):
            self.release()

    def _take(self) -> None:
        """Take all of it or nothing, without waiting."""
        if not self._thread.acquire(blocking=False):
            raise LockHeldError("another thread")
        try:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._place)
            except BlockingIOError:
                raise LockHeldError("another process") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._owner_file = OwnerFile(f"{self.file}.{self._place:014x}")
                _tell_once(self.file, error.strerror)
        except BaseException:
            self._thread.release()
            raise
        self._is_held = True

    def release(self) -> None:
        """Let go of it; done twice, it does nothing."""
        if not self._is_held or _PROCESS[-1] is not self._process:
            return
        self._is_held = False
        if self._process.watched.get(self.file) is self:
            del self._process.watched[self.file]
        if self._owner_file is not None:
            self._owner_file.remove()
        else:
            with suppress(OSError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self._place)
        self._thread.release()

    def watch(self) -> None:
        """Have ``check_place`` refuse what would be written into the folder once it has moved."""
        self._process.watched[self.file] = self

    def is_in_place(self) -> bool:
        """Whether the folder of the lock still is what its path leads to.

        One question to the file system. A storage that does not answer is no sign of a move.
        """
        if self._owner_file is not None:
            self._owner_file.touch()
        try:
            found = os.stat(os.path.dirname(self.file))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return (found.st_dev, found.st_ino) == self._folder

    def place_now(self) -> str | None:
        """Name the folder that the lock file lies in now; None where the system does not tell."""
        try:
            path = os.readlink(f"/proc/self/fd/{self._descriptor}")
        except OSError:
            return None
        folder = os.path.dirname(path)
        return folder if os.path.isfile(path) and os.path.isdir(folder) else None


def watched_lock(file: str | os.PathLike[str]) -> ProcessLock | None:
    """Return the lock on a file that this process holds and watches; None if there is none."""
    return _PROCESS[-1].watched.get(os.path.abspath(file))


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a path in a folder that this process has claimed and that is no longer there."""
    watched = _PROCESS[-1].watched
    if not watched:
        return
    absolute = os.path.abspath(path)
    for lock in list(watched.values()):
        folder = os.path.dirname(lock.file)
        if absolute.startswith(folder + os.sep) and not lock.is_in_place():
            raise MovedError(errno.ESTALE, f"{folder} was moved away")


@contextmanager
def hold(
    file: str,
    name: str,
    patience_seconds: float,
    progress: Callable[[], object] = lambda: None,
    *,
    pause: Callable[[float], object] = time.sleep,
    mode: int = 0o666,
) -> Iterator[None]:
    """Hold the lock of a name while the block runs.

    Args:
        file: the lock file; made if it is missing.
        name: what is locked.
        patience_seconds: longest wait during which ``progress`` does not change; 0 tries once.
        progress: something that changes while the holder is at work.
        pause: waits between two tries.
        mode: rights of a new lock file.

    Raises:
        TimeoutError: if the lock stays held without progress; its text names the holder.
        OSError: if the file cannot be opened.
    """
    seen, since = progress(), time.monotonic()
    while True:
        try:
            lock = ProcessLock(file, name, mode)
            break
        except LockHeldError as error:
            if (now := progress()) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since >= patience_seconds:
                raise TimeoutError(
                    f"{error} held the lock for {patience_seconds:.0f} s without progress"
                ) from None
        pause(_POLL_SECONDS)
    with lock:
        yield


def has_locks(file: str) -> bool:
    """Try whether the file system of a file, which is made if it is missing, has locks.

    Raises:
        OSError: if the file cannot be opened, or locking fails in another way.
    """
    descriptor = os.open(file, _FLAGS, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def _open_once(process: _Process, file: str, mode: int) -> int:
    """Return the descriptor of this process for what a path leads to.

    One that leads elsewhere by now stays open: closing it would drop locks that are held.
    """
    known = process.descriptors.get(file)
    if known is not None:
        with suppress(OSError):
            there, ours = os.stat(file, follow_symlinks=False), os.fstat(known)
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return known
    descriptor = os.open(file, _FLAGS, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", file)
    process.descriptors[file] = descriptor
    return descriptor


_TOLD: set[str] = set()


def _tell_once(file: str, reason: str | None) -> None:
    folder = os.path.dirname(file)
    if folder not in _TOLD:
        _TOLD.add(folder)
        logger.warning(
            "the file system of %s has no locks (%s); a file there keeps other processes out",
            folder,
            reason,
        )
