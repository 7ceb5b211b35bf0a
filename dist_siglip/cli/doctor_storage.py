"""Are run folder and shards where a rank needs them, whole, and quick enough?"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dist_siglip.cli.doctor_page import Finding
from dist_siglip.data.inspect.first_pairs import FirstPair, read_first_pair
from dist_siglip.data.remote import CacheSettings, RemoteError, ShardCache
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder
from dist_siglip.runs.disk_check import (
    DiskFacts,
    FolderError,
    is_locked_elsewhere,
    nearest_folder,
    try_folder,
)

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
