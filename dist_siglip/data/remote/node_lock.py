"""How do the processes of a node take turns?

By POSIX record locks on one file, a byte for each name. The system drops them when a process ends,
however it ends, and a forked process does not inherit them: a lock of ``flock`` would stay held by
every loader process that was forked while a transfer was under way. They do not keep threads of
one process apart, so each name has a lock of the process besides; and closing any descriptor of
the file would drop them all, so there is one descriptor per process and file, never closed.
"""

import fcntl
import hashlib
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dist_siglip.data.remote.stopping import pause

_POLL_SECONDS = 0.05
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_FLOCK = "hhqqi0q"  # struct flock of 64-bit Linux


class _Process:
    """The descriptors and thread locks of one process."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.descriptors: dict[str, int] = {}
        self.threads: dict[tuple[str, str], threading.Lock] = {}


_PROCESS = [_Process()]  # the last one is of this process
os.register_at_fork(after_in_child=lambda: _PROCESS.append(_Process()))


@contextmanager
def hold(
    file: str, name: str, patience_seconds: float, progress: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold the lock of a name while the block runs.

    Args:
        file: the lock file; made if it is missing.
        name: what is locked.
        patience_seconds: longest wait during which ``progress`` does not change; 0 tries once.
        progress: something that changes while the holder is at work.

    Raises:
        TimeoutError: if the lock stays held without progress; its text names the holder.
        OSError: if the file cannot be opened.
    """
    process = _PROCESS[-1]
    with process.guard:
        if file not in process.descriptors:
            process.descriptors[file] = os.open(file, _FLAGS, 0o600)
        descriptor = process.descriptors[file]
        thread = process.threads.setdefault((file, name), threading.Lock())
    place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    seen, since = progress(), time.monotonic()
    while not _take(thread, descriptor, place):
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since >= patience_seconds:
            holder = _holder(descriptor, place)
            raise TimeoutError(
                f"{holder} held the lock for {patience_seconds:.0f} s without progress"
            )
        pause(_POLL_SECONDS)
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, place)
        thread.release()


def _take(thread: threading.Lock, descriptor: int, place: int) -> bool:
    """Take both locks or none, without waiting."""
    if not thread.acquire(blocking=False):
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except BlockingIOError:
        thread.release()
        return False
    except BaseException:
        thread.release()
        raise
    return True


def _holder(descriptor: int, place: int) -> str:
    """Name the process that holds a lock, where the system tells."""
    if sys.platform != "linux":
        return "another process"
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
    if kind == fcntl.F_UNLCK:  # locks of this process do not show
        return "another thread"
    return f"process {pid}" if pid > 0 else "a process of another container"
