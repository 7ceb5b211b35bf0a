"""Cache of remote shards on the disk of a node, and a thread that fills it ahead of training.

Every shard is one file named by the hash of its URL, so nothing in a URL chooses a path. One
process fetches it under the lock of its name while the others wait. Room is made before a transfer:
the copies used longest ago go first. A reader that has a copy open keeps it until it closes it.
Beside a copy lie its record (``.json``: what the server said) and, while it is fetched, a sparse
file of its size (``.want``) that holds its room. Only files of such names are ever deleted.
A copy is believed for a while, then the server is asked whether the file changed.

The thread of one process per node asks from time to time which shards come next, and fetches them
in that order, as far ahead as half of the cache reaches: the other half stays for what is being
read. Every round marks all these shards as used, so the cache evicts what lies behind first. A
shard that cannot be fetched is passed over, and tried again after a pause that doubles.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from dist_siglip.data.remote.connections import (
    ATTEMPTS,
    PATIENCE_SECONDS,
    RemoteError,
    RemoteOutageError,
    StoppedError,
    endpoint,
    pause,
    stoppable,
)
from dist_siglip.data.remote.locations import is_remote, redact
from dist_siglip.data.remote.transfer import RemoteFile, describe_remote, download
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
_MOST_AHEAD = 256  # shards, however small
_LONGEST_RETRY = 32  # times retry_seconds


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


class Prefetcher:
    """Fetches shards ahead of the readers; never raises into training.

    Args:
        cache: where they go.
        upcoming: names the shards needed from now on, in order; asked again for every round.
        pause_seconds: between two rounds.
        retry_seconds: pause after the first failure of a shard; failures are logged.
    """

    def __init__(
        self,
        cache: ShardCache,
        upcoming: Callable[[], Iterable[str]],
        *,
        pause_seconds: float = 1.0,
        retry_seconds: float = 30.0,
    ) -> None:
        self._cache = cache
        self._upcoming = upcoming
        self._pause_seconds = pause_seconds
        self._retry_seconds = retry_seconds
        self._failures: dict[str, tuple[int, float]] = {}  # how many, and not again before
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; does nothing if it has begun."""
        if self._thread is None:
            self._stopped = threading.Event()  # an earlier thread keeps its own
            self._thread = threading.Thread(
                target=self._run, args=(self._stopped,), name="shard prefetch", daemon=True
            )
            self._thread.start()

    def stop(self, patience_seconds: float = 5.0) -> None:
        """End, also in the middle of a transfer, and wait for it."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(patience_seconds)
            self._thread = None

    def fetch_ahead(self) -> int:
        """Go one round; return how many bytes ahead are here now.

        Raises:
            UserError: if the cache is full or closed.
        """
        ahead, seen = 0, set[str]()
        for shard in self._upcoming():
            if shard in seen or len(seen) >= _MOST_AHEAD:
                break  # the data set is smaller than the way ahead
            seen.add(shard)
            if is_remote(shard):
                ahead += self._fetch(shard)
            if ahead >= self._cache.max_bytes // 2:
                break
        return ahead

    def _fetch(self, shard: str) -> int:
        """Return the bytes of a shard that is here now; 0 if it is unavailable for now."""
        failures, not_before = self._failures.get(shard, (0, 0.0))
        if time.monotonic() < not_before:
            return 0
        try:
            size = self._cache.hold_ready(shard)
        except RemoteError as error:
            wait = self._retry_seconds * min(2**failures, _LONGEST_RETRY)
            self._failures[shard] = failures + 1, time.monotonic() + wait
            _LOGGER.warning("fetching ahead: %s; again in %.0f s", error, wait)
            return 0
        self._failures.pop(shard, None)
        return size

    def _run(self, stopped: threading.Event) -> None:
        try:
            with stoppable(stopped):
                while not stopped.is_set():
                    pause = self._pause_seconds
                    try:
                        self.fetch_ahead()
                    except Exception as error:  # noqa: BLE001 - readers say what is wrong
                        _LOGGER.warning("fetching ahead: %s: %s", type(error).__name__, error)
                        pause = self._retry_seconds
                    stopped.wait(pause)
        except StoppedError:
            pass


def describe_tight_cache(cache: ShardCache, shard_bytes: list[int], block_shards: int) -> str:
    """Warn if two blocks of shards do not fit a cache.

    The order mixes ``block_shards`` shards at a time; while one block is read the next one is
    fetched. What does not fit is fetched again and again.

    Returns:
        One line for the log; empty if they fit.
    """
    largest = sum(sorted(shard_bytes)[-2 * block_shards :])
    if largest <= cache.max_bytes:
        return ""
    return (
        f"cache.max_gib ({cache.settings.max_gib:g}) holds less than two blocks of shards "
        f"({largest / 2**30:.3g} GiB): shards will be fetched more than once an epoch; raise it or "
        f"lower block_shards ({block_shards})"
    )
