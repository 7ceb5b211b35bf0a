"""A file that stands for a lock where the file system has none.

It names the process that made it, and is taken over once that process is known to have ended: on
the same machine the system tells; from another machine, a file that was not touched for an hour
counts as left behind, and one of a job that SLURM has started anew as well.
"""

import json
import os
import platform
import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

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
