"""A disk that fails at one chosen call, and a process or a machine that ends there.

Counted are the calls by which Python code changes files below one folder: open for writing, write,
fsync, mkdir, rename, unlink and their like. Each may be the one that fails (``ENOSPC``, ``EIO``),
before which the process is killed, or before which the power goes: then what was not synced is
gone, data and names alike. A write that is cut short has written its first half.
"""

import errno
import io
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

KINDS = ("ENOSPC", "EIO", "kill", "power")
_CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open", "scandir", "listdir")
# What needs room; a full disk stays full for these.
_NEEDS_ROOM = ("write", "create", "mkdir", "fsync")


class Disk:
    """Counts calls below a folder and lets one of them fail.

    Args:
        root: the folder.
        fails_at: number of the call, from 1; 0 only counts.
        kind: one of ``KINDS``.
    """

    def __init__(self, root: Path, fails_at: int = 0, kind: str = "EIO"):
        self.root = str(root)
        self.fails_at = fails_at
        self.kind = kind
        self.calls: list[str] = []
        self.is_full = False
        self._own = {name: getattr(os, name) for name in _CALLS}
        self._own_open = io.open
        self._unsynced_data: dict[int, str] = {}  # inode -> path
        self._unsynced_names: list[tuple[int, Callable[[], object]]] = []  # folder, how to undo

    @contextmanager
    def failing(self):
        """Put the disk in the place of the real one."""
        for name in _CALLS:
            setattr(os, name, self._counted(name))
        io.open = self._open
        try:
            yield self
        finally:
            io.open = self._own_open
            for name, function in self._own.items():
                setattr(os, name, function)

    def step(self, name: str, before_the_end: Callable[[], object] = lambda: None) -> None:
        """Count a call, and fail if it is its turn."""
        self.calls.append(name)
        is_turn = len(self.calls) == self.fails_at
        if is_turn and self.kind in ("kill", "power"):
            before_the_end()
            if self.kind == "power":
                self._lose_what_is_not_synced()
            os.kill(os.getpid(), signal.SIGKILL)
        if is_turn and self.kind == "ENOSPC" and name in _NEEDS_ROOM:
            self.is_full = True
        if (self.is_full and name in _NEEDS_ROOM) or (is_turn and self.kind == "EIO"):
            before_the_end()
            code = errno.ENOSPC if self.is_full else errno.EIO
            raise OSError(code, os.strerror(code))

    def _counted(self, name):
        own = self._own[name]

        def call(*arguments, **options):
            path = self._path_of(arguments[0] if arguments else ".", options.get("dir_fd"))
            if not path.startswith(self.root):
                return own(*arguments, **options)
            self.step(name)
            result = own(*arguments, **options)
            self._remember(name, path, arguments)
            return result

        return call

    def _path_of(self, target, folder=None):
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        above = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else ""
        return os.path.abspath(os.path.join(above, os.fspath(target)))

    def _remember(self, name, path, arguments):
        if name == "fsync":
            inode = os.stat(path).st_ino
            self._unsynced_data.pop(inode, None)
            self._unsynced_names = [each for each in self._unsynced_names if each[0] != inode]
        elif name == "mkdir":
            self._note_name(path, lambda: shutil.rmtree(path, ignore_errors=True))
        elif name in ("rename", "replace"):
            target = os.path.abspath(arguments[1])
            self._note_name(target, lambda: self._own["rename"](target, path))

    def _note_name(self, path, undo):
        self._unsynced_names.append((os.stat(os.path.dirname(path)).st_ino, undo))

    def _open(self, file, mode="r", *arguments, **options):
        path = self._path_of(file)
        if not path.startswith(self.root) or not set(mode) & set("wax+"):
            return self._own_open(file, mode, *arguments, **options)
        self.step("create")
        self._note_name(path, lambda: suppress_missing(path))
        opened = self._own_open(file, mode, *arguments, **options)
        self._unsynced_data[os.fstat(opened.fileno()).st_ino] = path
        return _File(opened, self)

    def _lose_what_is_not_synced(self):
        """Undo names, newest first, and cut data, as a file system may after the power went."""
        inodes = set(self._unsynced_data)
        for folder, _, files in os.walk(self.root):
            for name in files:
                path = os.path.join(folder, name)
                if os.stat(path).st_ino in inodes:
                    os.truncate(path, os.stat(path).st_size // 2)
        for _, undo in reversed(self._unsynced_names):
            with suppress(OSError):
                undo()


class _File:
    """A file of such a disk; what is written goes there at once."""

    def __init__(self, file, disk):
        self._file = file
        self._disk = disk

    def write(self, data):
        def write_half():
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()

        self._disk.step("write", write_half)
        self._disk._unsynced_data[os.fstat(self._file.fileno()).st_ino] = self._file.name
        count = self._file.write(data)
        self._file.flush()
        return count

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def suppress_missing(path):
    """Remove a file that may be gone."""
    with suppress(FileNotFoundError):
        os.remove(path)


def in_fork(work: Callable[[], object], seconds: float = 300) -> int:
    """Call ``work`` in a forked process; return 0, or the negative signal it ended by."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(seconds))
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
