"""Checks of run folder and shards: that they are there, whole and fast enough, and can be written.

The folder of a run is tested with a hidden file, written as checkpoints are, and removed.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from dist_siglip.data.inspect import FirstPair, read_first_pair
from dist_siglip.data.remote import CacheSettings, RemoteError, ShardCache
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.urls import expand_shards
from dist_siglip.doctor.page import Finding
from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder
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


_GIB = 2**30
_LEAST_BYTES = 2**28
_USUAL_BYTES = 10 * _GIB
_LEAST_INODES = 1000
_SLOW_BYTES_PER_SECOND = 50e6
_SLOW_RENAME_SECONDS = 1.0
_VISIBLE_WITHIN_SECONDS = 5.0
_SLOW_PAIR_SECONDS = 10.0


def look_at_folder(run_dir: Path, num_bytes: int) -> list[Finding]:
    """Try the run folder as the rank that writes checkpoints.

    Args:
        run_dir: need not exist yet.
        num_bytes: to write.
    """
    try:
        facts = try_folder(run_dir, num_bytes)
        lock = RunFolder(run_dir).lock_file
        is_in_use = lock.is_file() and is_locked_elsewhere(lock)
    except FolderError as error:
        remedy = "make room, mend its rights or its mount, or choose another run_dir"
        place = nearest_folder(run_dir)
        return [Finding("FAIL", "run folder", f"{place} {error}", remedy)]
    findings = list(judge_disk(facts, checkpoint_bytes(RunFolder(run_dir))))
    if is_in_use:
        text = f"{run_dir} is in use by another process"
        remedy = "fit will refuse it: wait for that run, end it, or choose another run_dir"
        findings.append(Finding("warn", "run folder", text, remedy))
    return findings


def checkpoint_bytes(folder: RunFolder) -> int:
    """Return the size of the newest checkpoint of a run; 0 if it has none."""
    newest = folder.newest_checkpoint()
    if newest is None:
        return 0
    files = [newest] if newest.is_file() else [f for f in newest.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def judge_disk(facts: DiskFacts, checkpoint: int) -> Iterator[Finding]:
    """Judge what was found out about a run folder.

    Args:
        facts: see there.
        checkpoint: bytes of a checkpoint, 0 if not known.

    Example:
        >>> facts = DiskFacts(Path("/runs"), "nfs4 at /runs", 2**20, None, 1e9, 0.01)
        >>> [finding.status for finding in judge_disk(facts, 0)]
        ['FAIL']
    """
    inodes = "" if facts.free_inodes is None else f" and {facts.free_inodes:,} files"
    text = (
        f"{facts.folder} ({facts.file_system}): {facts.free_bytes / _GIB:,.1f} GiB{inodes} free, "
        f"writes {facts.bytes_per_second / 1e6:,.0f} MB/s, renames in "
        f"{1e3 * facts.rename_seconds:,.0f} ms"
    )
    # Two are kept, and a third is beside them until it is whole.
    needed = 3 * checkpoint or _USUAL_BYTES
    least = max(checkpoint, _LEAST_BYTES)
    if facts.free_bytes < least:
        remedy = f"make room: the next checkpoint needs {least / _GIB:.2g} GiB"
        yield Finding("FAIL", "run folder", text, remedy)
    elif facts.free_bytes < needed:
        yield Finding("warn", "run folder", text, f"{needed / _GIB:.2g} GiB would be safe")
    elif facts.free_inodes is not None and facts.free_inodes < _LEAST_INODES:
        yield Finding("FAIL", "run folder", text, "remove files: hardly any can be added")
    elif (
        facts.bytes_per_second < _SLOW_BYTES_PER_SECOND
        or facts.rename_seconds > _SLOW_RENAME_SECONDS
    ):
        remedy = "checkpoints will take long: choose a faster file system, or save less often"
        yield Finding("warn", "run folder", text, remedy)
    else:
        yield Finding("ok", "run folder", text)
    if not facts.has_locks:
        remedy = "runs keep each other out by a file there; mount it with locks if you can"
        yield Finding("warn", "run folder", f"{facts.folder}: no locks of files", remedy)


def look_for_file(path: Path) -> list[Finding]:
    """Look for the file that the first rank keeps, and locks, in the run folder."""
    deadline = time.monotonic() + _VISIBLE_WITHIN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            text = f"{path.parent} is not the folder that rank 0 sees"
            remedy = "put run_dir on a file system that all nodes share"
            return [Finding("FAIL", "shared folder", text, remedy)]
        time.sleep(0.1)
    try:
        is_locked = is_locked_elsewhere(path)
    except FolderError as error:
        text = f"{path.parent}: this rank {error}"
        return [Finding("FAIL", "shared folder", text, "mend its rights or its mount")]
    if not is_locked:
        text = f"a lock in {path.parent} does not hold on this node"
        remedy = "two runs could write into one run_dir unseen; mount it with locks (flock)"
        return [Finding("warn", "shared folder", text, remedy)]
    return [Finding("ok", "shared folder", "all ranks see it, and its locks hold")]


class ShardSet(NamedTuple):
    """Shards of one setting, and how training reads them.

    Attributes:
        name: the setting.
        shards: as ``expand_shards`` takes them.
        captions: where captions are.
        image_extensions: members that are the picture of a sample, in order of preference.
        pictures: what decides the pixels of an encoded picture.
        cache: copies of remote shards.
    """

    name: str
    shards: str | Sequence[str]
    captions: CaptionRule
    image_extensions: tuple[str, ...]
    pictures: PicturePolicy
    cache: CacheSettings


def look_at_shards(shard_set: ShardSet, most: int) -> tuple[list[Finding], dict[str, str]]:
    """Read one pair of each of the first shards.

    Args:
        shard_set: the shards.
        most: shards to look into.

    Returns:
        Findings, and what must be the same on every rank.
    """
    name = shard_set.name
    try:
        shard_set.captions.check()
        paths = expand_shards(shard_set.shards, name=name)
        copies = ShardCache(replace(shard_set.cache, patience_seconds=0.0))
    except (UserError, RemoteError, OSError) as error:
        return [Finding("FAIL", name, str(error), "every node needs the shards")], {}
    pairs = [
        read_first_pair(
            path,
            captions=shard_set.captions,
            image_extensions=shard_set.image_extensions,
            pictures=shard_set.pictures,
            cache=copies,
        )
        for path in paths[:most]
    ]
    facts = {f"{name}: shards": str(len(paths))}
    facts |= {f"{name}: {pair.shard}": pair.fingerprint for pair in pairs}
    return list(judge_pairs(pairs, len(paths), name)), facts


def judge_pairs(pairs: Sequence[FirstPair], num_shards: int, check: str) -> Iterator[Finding]:
    """Judge the first pairs of shards.

    Args:
        pairs: of the first shards.
        num_shards: all that are named.
        check: name of the line.

    Example:
        >>> pair = FirstPair("a.tar", 0, "", True, 0.1, "cut short")
        >>> [finding.text for finding in judge_pairs([pair], 9, "shards")]
        ['a.tar: cut short']
    """
    bad = [pair for pair in pairs if pair.failure]
    for pair in bad:
        remedy = "dist-siglip data check lists everything that is wrong with shards"
        yield Finding("FAIL", check, f"{pair.shard}: {pair.failure}", remedy)
    if bad:
        return
    slowest = max(pair.seconds for pair in pairs)
    bare = sum(not pair.had_side_car for pair in pairs)
    text = (
        f"{num_shards} named, {len(pairs)} opened, {sum(p.num_samples for p in pairs):,} samples "
        f"in these; a pair of each decoded, the slowest in {slowest:.2g} s"
    )
    if slowest > _SLOW_PAIR_SECONDS:
        yield Finding("warn", check, text, "this storage is slow: copy the shards nearer")
    elif bare:
        text = f"{num_shards} named; {bare} of {len(pairs)} opened had no side-car"
        remedy = "dist-siglip data index makes them ahead; else the first start scans every shard"
        yield Finding("warn", check, text, remedy)
    else:
        yield Finding("ok", check, text)
