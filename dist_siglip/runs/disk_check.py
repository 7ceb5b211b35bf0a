"""Test of a folder for runs: free space, speed, and whether it writes, renames, syncs and locks.

Everything is tried in a hidden file of its own, as checkpoints are written, and removed.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from dist_siglip.system.atomic import open_atomically
from dist_siglip.system.process_lock import LockHeldError, ProcessLock, has_locks

_PIECE = 2**20


class FolderError(Exception):
    """What a folder cannot do, in half a sentence."""


class DiskFacts(NamedTuple):
    """What was found out about a folder.

    Attributes:
        folder: where it was tried: the folder, or the nearest one above it that exists.
        file_system: its type and where it is mounted, such as "nfs4 at /shared".
        free_bytes: that this user may fill.
        free_inodes: files that can be added; None where the file system does not count.
        bytes_per_second: of writing and syncing.
        rename_seconds: of a small file that is written, synced and renamed, the folder synced.
        has_locks: whether the file system has locks.
    """

    folder: Path
    file_system: str
    free_bytes: int
    free_inodes: int | None
    bytes_per_second: float
    rename_seconds: float
    has_locks: bool = True


def try_folder(folder: Path, num_bytes: int) -> DiskFacts:
    """Write, sync, rename, read back and lock in a folder.

    Args:
        folder: need not exist yet.
        num_bytes: to write; at least 1.

    Raises:
        FolderError: naming the first thing that does not work.
    """
    place = nearest_folder(folder)
    room = os.statvfs(place)
    test = place / f".dist_siglip-doctor-{uuid4().hex}"
    try:
        bytes_per_second = _write_and_read(test, num_bytes)
        started = time.perf_counter()
        with _named("rename a file"), open_atomically(test) as file:
            file.write(b"small")
        rename_seconds = time.perf_counter() - started
        with _named("lock a file"):
            can_lock = has_locks(str(test))
    finally:
        with _named("remove a file"):
            test.unlink(missing_ok=True)
    return DiskFacts(
        folder=place,
        file_system=file_system_of(place, Path("/proc/mounts").read_text(encoding="utf-8")),
        free_bytes=room.f_bavail * room.f_frsize,
        free_inodes=room.f_favail if room.f_files else None,
        bytes_per_second=bytes_per_second,
        rename_seconds=rename_seconds,
        has_locks=can_lock,
    )


def nearest_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def is_locked_elsewhere(path: Path) -> bool:
    """Whether another process, or another part of this one, holds the lock of a file.

    Raises:
        FolderError: if it cannot be opened or locked.
    """
    try:
        with _named("lock a file"), ProcessLock(str(path)):
            return False
    except LockHeldError:
        return True


@contextmanager
def locked_file(folder: Path, name: str) -> Iterator[Path]:
    """Keep a file in a folder and hold its lock until the block ends, for others to look at.

    Raises:
        FolderError: if it cannot be made or locked.
    """
    path = nearest_folder(folder) / name
    with _named("make a file"):
        path.touch(exist_ok=False)
    try:
        with _named("lock a file"):
            lock = ProcessLock(str(path))
        with lock:
            yield path
    finally:
        path.unlink(missing_ok=True)


def file_system_of(path: Path, mounts: str) -> str:
    """Name the type of the file system of a path, and where it is mounted.

    Args:
        path: absolute.
        mounts: content of /proc/mounts.

    Example:
        >>> mounts = "/dev/sda1 / ext4 rw 0 0" + chr(10) + "srv:/x /shared nfs4 rw 0 0"
        >>> file_system_of(Path("/shared/runs"), mounts), file_system_of(Path("/tmp"), mounts)
        ('nfs4 at /shared', 'ext4 at /')
    """
    best, kind = Path("/"), "unknown"
    for line in mounts.splitlines():
        fields = line.split()
        # The kernel writes a blank of a name as an octal number.
        place = Path(fields[1].replace(r"\040", " ")) if len(fields) > 2 else None
        if place is not None and path.is_relative_to(place) and place.is_relative_to(best):
            best, kind = place, fields[2]
    return f"{kind} at {best}"


def _write_and_read(path: Path, num_bytes: int) -> float:
    """Write and sync; return the speed. What is read must be what was written."""
    piece = os.urandom(min(_PIECE, num_bytes))
    count = -(-num_bytes // len(piece))
    with _named("write a file"), path.open("wb") as file:
        started = time.perf_counter()
        for _ in range(count):
            file.write(piece)
        file.flush()
        with _named("sync a file"):
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    with _named("read a file"), path.open("rb") as file:
        if any(file.read(len(piece)) != piece for _ in range(count)):
            raise FolderError("does not give back what was written to it")
    return count * len(piece) / seconds


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say what was tried when it fails."""
    try:
        yield
    except OSError as error:
        raise FolderError(f"cannot {what}: {error.strerror or error}") from error
