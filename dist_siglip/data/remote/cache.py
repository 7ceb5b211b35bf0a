"""Cache of remote shards on the disk of a node.

Every shard is one file named by the hash of its URL, so nothing in a URL chooses a path. One
process fetches it under the lock of its name while the others wait. Room is made before a transfer:
the copies used longest ago go first. A reader that has a copy open keeps it until it closes it.
Beside a copy lie its record (``.json``: what the server said) and, while it is fetched, a sparse
file of its size (``.want``) that holds its room. Only files of such names are ever deleted.
A copy is believed for a while, then the server is asked whether the file changed.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from dist_siglip.data.remote.connections import (
    ATTEMPTS,
    PATIENCE_SECONDS,
    RemoteOutageError,
    endpoint,
    pause,
)
from dist_siglip.data.remote.locations import redact
from dist_siglip.data.remote.transfer import RemoteError, RemoteFile, describe_remote, download
from dist_siglip.errors import UserError, check_least
from dist_siglip.system import process_lock
from dist_siglip.system.atomic import user_cache_folder, write_atomically

_LOGGER = logging.getLogger(__name__)
_PATIENCE_SECONDS = 60.0  # for each attempt: above the time it may take without a byte
_COPY = re.compile(r"[0-9a-f]{32}\.tar")
_OURS = re.compile(r"[0-9a-f]{32}\.(tar|want)")
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_LOCK_MODE = 0o600  # for this user alone, as the copies are
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Where copies of remote shards are kept on each node, and how many.

    Args:
        folder: folder on a local disk of the node; None for ``dist_siglip/shards`` in the
            user's cache folder.
        max_gib: most they may hold together, in GiB, over all processes of the node; > 0.
        attempts: tries for each transfer, at least; >= 1.
        recheck_hours: so long a copy is believed before the server is asked whether the file
            changed; 0 asks whenever a process opens it.
        patience_seconds: so long a server is waited for that does not answer or is overloaded, at
            the start and during training, however many tries that takes; then the command ends
            with code 75. Keep it below watchdog.stall_minutes.
    """

    folder: str | None = None
    max_gib: float = 100.0
    attempts: int = ATTEMPTS
    recheck_hours: float = 1.0
    patience_seconds: float = PATIENCE_SECONDS

    def check(self) -> None:
        """Refuse numbers out of range."""
        if not 0 < self.max_gib < math.inf:
            raise UserError(
                f"cache.max_gib ({self.max_gib}) must be a finite number above 0; give what the "
                "disk has"
            )
        check_least(1, of="cache.", attempts=self.attempts)
        if not self.recheck_hours >= 0:
            raise UserError(f"cache.recheck_hours ({self.recheck_hours}) must not be negative")
        if not 0 <= self.patience_seconds < math.inf:
            raise UserError(
                f"cache.patience_seconds ({self.patience_seconds}) must be at least 0, and finite"
            )


class ShardCache:
    """Whole copies of remote shards, shared by all processes of a node.

    Holds nothing but its settings: it may be pickled and forked.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.folder = settings.folder or user_cache_folder("shards")
        self.max_bytes = int(settings.max_gib * 2**30)
        self._locks = os.path.join(self.folder, "locks")
        self._patience_seconds = _PATIENCE_SECONDS * max(2, settings.attempts)
        self._patience_seconds += settings.patience_seconds

    def fetch(self, url: str) -> str:
        """Return the path of a verified whole copy, fetched now if it is not there.

        Another process may evict the copy before it is opened: use ``open`` to read it.

        Raises:
            RemoteError: if it cannot be fetched.
            UserError: if the folder is full or closed, or the shard larger than the cache.
        """
        os.close(self.open(url))
        return self._path(url)

    def open(self, url: str) -> int:
        """Return a descriptor of a verified whole copy, fetched now if it is not there.

        Raises:
            RemoteError: if it cannot be fetched.
            UserError: if the folder is full or closed, or the shard larger than the cache.
        """
        return self._open(url, self.settings.patience_seconds)

    def _open(self, url: str, patience_seconds: float) -> int:
        path = self._path(url)
        try:
            if (present := self._open_fresh(path)) is not None:
                return present
            os.makedirs(self.folder, exist_ok=True)
            with self._hold(path, self._patience_seconds, lambda: _size(f"{path}.part")):
                if not self._is_fresh(path):
                    self._renew(url, path, patience_seconds)
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                _touch(descriptor)
        except TimeoutError as error:
            raise RemoteOutageError(f"{redact(url)} cannot be fetched: {error}") from None
        except OSError as error:
            raise self._explain(error) from error
        return descriptor

    def hold_ready(self, url: str) -> int:
        """Fetch a shard that is wanted, waiting for no outage, and return its bytes.

        Raises:
            RemoteError: if it cannot be fetched.
            UserError: if the folder is full or closed, or the shard larger than the cache.
        """
        descriptor = self._open(url, patience_seconds=0.0)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def describe(self) -> str:
        """Describe what is kept in one line, for a log."""
        sizes = [size for _, size, name in self._entries() if _COPY.fullmatch(name)]
        held = sum(sizes) / 2**30
        return f"{len(sizes)} shards, {held:.2f} of {self.settings.max_gib:g} GiB in {self.folder}"

    def _hold(
        self,
        name: str,
        patience_seconds: float,
        progress: Callable[[], object] = lambda: None,
    ) -> AbstractContextManager[None]:
        """Hold the lock of a name; the wait of a thread that is told to stop ends."""
        return process_lock.hold(
            self._locks, name, patience_seconds, progress, pause=pause, mode=_LOCK_MODE
        )

    def _path(self, url: str) -> str:
        server = endpoint(url)
        text = f"{server}\n{url}" if server else url
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return os.path.join(self.folder, f"{name}.tar")

    def _open_fresh(self, path: str) -> int | None:
        """Open a copy without a lock: what has its final name is whole."""
        if not self._is_fresh(path):
            return None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # evicted this moment
            return None
        _touch(descriptor)
        return descriptor

    def _is_fresh(self, path: str) -> bool:
        """Say whether a copy is there that the server was asked about lately."""
        try:
            return (
                os.path.exists(path)
                and time.time() - os.stat(_record(path)).st_mtime
                < 3600 * self.settings.recheck_hours
            )
        except FileNotFoundError:
            return False

    def _renew(self, url: str, path: str, patience_seconds: float) -> None:
        """Ask the server; keep the copy if it is the same, else fetch. The lock is held.

        With a copy at hand, an outage is not waited for.
        """
        attempts = self.settings.attempts
        record = _read_record(path)
        has_copy = record.get("bytes", -2) == _size(path)
        try:
            remote = describe_remote(
                url,
                attempts=attempts,
                patience_seconds=0.0 if has_copy else patience_seconds,
                refresh=bool(record),
            )
        except RemoteError as error:
            if error.is_missing or not has_copy:
                raise
            _LOGGER.warning("%s; the copy of this node is used, though it may be old", error)
            os.utime(_record(path))
            return
        same = _said(remote) == {name: record.get(name) for name in ("size", "etag")}
        can_tell = remote.size >= 0 or remote.etag is not None
        if same and can_tell and has_copy:
            os.utime(_record(path))
            return
        if remote.size > self.max_bytes:
            raise UserError(
                f"cache.max_gib ({self.settings.max_gib:g}) is smaller than shard "
                f"{redact(url)!r}; set it to {remote.size / 2**30 * 1.01:.4g} at least"
            )
        want = f"{path[:-4]}.want"
        Path(path).unlink(missing_ok=True)  # another version
        try:
            self._make_room(want, max(0, remote.size))
            remote = download(
                url,
                path,
                attempts=attempts,
                patience_seconds=patience_seconds,
                remote=remote,
                max_bytes=self.max_bytes,
            )
        finally:
            Path(want).unlink(missing_ok=True)
        if remote.size < 0:  # nobody could say how much room it takes
            self._make_room(want, 0)
            Path(want).unlink(missing_ok=True)
        record = {**_said(remote), "bytes": _size(path)}
        write_atomically(Path(_record(path)), json.dumps(record), sync=False)

    def _make_room(self, want: str, size: int) -> None:
        """Delete what was used longest ago until a shard fits, and hold its room."""
        since = time.monotonic()
        Path(want).unlink(missing_ok=True)  # of a process that was killed
        while True:
            with self._hold("room", self._patience_seconds):
                entries = sorted(self._entries())
                total = sum(entry[1] for entry in entries)
                for _, held, name in entries:
                    if total + size <= self.max_bytes:
                        break
                    if self._evict(os.path.join(self.folder, name)):
                        total -= held
                if total + size <= self.max_bytes:
                    with open(want, "xb") as file:
                        file.truncate(size)
                    return
            # Others are fetching: what they hold can go when they are done.
            if time.monotonic() - since > self._patience_seconds:
                raise TimeoutError("the cache stays full of shards that are being fetched")
            pause(0.1)

    def _evict(self, path: str) -> bool:
        """Delete a copy or the room of a dead process; False if a live process is at it."""
        copy = path.removesuffix(".want").removesuffix(".tar") + ".tar"
        try:
            with self._hold(copy, 0.0):
                for file in (path, _record(copy), f"{copy}.part"):
                    Path(file).unlink(missing_ok=True)
        except TimeoutError:
            return False
        return True

    def _entries(self) -> list[tuple[int, int, str]]:
        """List (last use, bytes, name) of what takes room."""
        found: list[tuple[int, int, str]] = []
        if not os.path.isdir(self.folder):  # nothing was fetched yet
            return found
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not _OURS.fullmatch(entry.name):
                    continue
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                found.append((status.st_atime_ns, status.st_size, entry.name))
        return found

    def _explain(self, error: OSError) -> Exception:
        """Say what a person can do about a folder that does not take a file."""
        if error.errno in _FULL:
            return UserError(
                f"cache.folder ({self.folder!r}) is on a full disk; lower cache.max_gib "
                f"({self.settings.max_gib:g}), free space or name another folder"
            )
        if error.errno in _CLOSED:
            return UserError(
                f"cache.folder ({self.folder!r}) cannot be written ({error.strerror}); name another"
            )
        return error


def _record(path: str) -> str:
    return f"{path[:-4]}.json"


def _read_record(path: str) -> dict[str, object]:
    """Read what the server said about a copy; empty if there is no sound record."""
    try:
        record = json.loads(Path(_record(path)).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _said(remote: RemoteFile) -> dict[str, object]:
    return {"size": remote.size, "etag": remote.etag}


def _size(path: str) -> int:
    """Return the size of a file; -1 if there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


def _touch(descriptor: int) -> None:
    """Note that a copy is used now; its modification time stays."""
    os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
