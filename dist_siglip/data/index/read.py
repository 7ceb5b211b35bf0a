"""The samples that a shard holds, and where; kept beside the shard.

``read_index`` reads the side-car ``<shard>.idx.npz`` if it was made for exactly this
file (name, size and modification time), else it scans the headers and writes the side-car; in a
folder that cannot be written, the side-car goes to the user's cache folder.

A damaged shard has an index too, of what is whole before the damage, but leaves no side-car;
``load_index`` refuses it.
"""

import io
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from dist_siglip.data.index.shard_index import ShardIndex, build_index
from dist_siglip.data.index.side_car import (
    SIDE_CAR_VERSION,
    digest_of,
    index_folder,
    parse_side_car,
    read_side_car,
    side_car_places,
    size_when_indexed,
    write_side_car,
)
from dist_siglip.data.index.tar_scan import DamagedTarError, scan_tar
from dist_siglip.data.remote import RemoteError, RemoteOutageError, ShardCache, is_remote
from dist_siglip.data.remote.locations import redact, shard_name
from dist_siglip.data.remote.retries import RemoteRefusalError
from dist_siglip.data.remote.transfer import describe_remote, read_small
from dist_siglip.errors import UserError

_LOGGER = logging.getLogger(__name__)
_LARGEST_SIDE_CAR = 1 << 28
# Side-cars of a remote folder that this process asked for without an answer; then it asks no more.
_FAILED_PROBES: Counter[str] = Counter()
_MOST_FAILED_PROBES = 3


def load_index(path: str, cache: ShardCache | None = None) -> ShardIndex:
    """Return the index of a sound shard; see ``read_index``.

    Raises:
        UserError: if the shard is damaged, cut short or holds a member twice.
    """
    index = read_index(path, cache=cache)
    if index.damage:
        raise UserError(index.damage)
    return index


def read_index(path: str, *, rebuild: bool = False, cache: ShardCache | None = None) -> ShardIndex:
    """Return the index of a shard from its side-car, or build it and leave a side-car.

    A remote shard is asked for its size and tag. Its side-car lies in the user's cache folder;
    where there is none, the side-car beside the remote shard is taken if it was made for a file of
    this name and size; else the shard is fetched and scanned.

    Args:
        path: tar file, or URL of one.
        rebuild: scan the shard although there is a side-car.
        cache: copies of remote shards; needed for URLs.

    Raises:
        OSError: if the shard cannot be read.
        UserError: if a remote shard is missing or denied, or there is no cache for it.
        OutageError: if its server does not answer.
    """
    if is_remote(path):
        return _read_remote(path, rebuild, cache)
    status = os.stat(path)
    identity: dict[str, str | int] = {
        "version": SIDE_CAR_VERSION,
        "name": os.path.basename(path),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    for side_car in () if rebuild else side_car_places(path):
        index = read_side_car(side_car, path, identity)
        if index is not None:
            return index
    index = _scan(path, path, lambda: _sign_of_a_cut(path, identity))
    for side_car in () if index.damage else side_car_places(path):
        if write_side_car(side_car, index, identity):
            break
    return index


def _read_remote(url: str, rebuild: bool, cache: ShardCache | None) -> ShardIndex:
    """Return the index of a remote shard."""
    if cache is None:
        raise UserError(f"shard {redact(url)!r} is remote, and there is no cache for it")
    try:
        remote = describe_remote(
            url,
            attempts=cache.settings.attempts,
            patience_seconds=cache.settings.patience_seconds,
        )
        name = shard_name(url)
        made_for: dict[str, str | int] = {
            "version": SIDE_CAR_VERSION,
            "name": name,
            "size": remote.size,
        }
        identity = {**made_for, "etag": remote.etag or ""}
        place = os.path.join(index_folder(), f"{digest_of(url)}-{name[-80:]}.idx.npz")
        known = remote.size >= 0 or bool(remote.etag)  # else a change would not show
        index = read_side_car(place, url, identity) if known and not rebuild else None
        if index is not None:
            return index
        if not rebuild and not set("?#") & set(url):
            index = _read_beside(url, cache, made_for)
        if index is None:
            index = _scan_copy(url, cache)
    except RemoteRefusalError as error:
        raise UserError(f"{error}; check the address and the network") from error
    index = replace(index, path=url)
    if known and not index.damage:
        write_side_car(place, index, identity)
    return index


def _read_beside(url: str, cache: ShardCache, made_for: dict[str, str | int]) -> ShardIndex | None:
    """Read the side-car beside a remote shard; None if there is none that helps.

    It may be absent, and some servers say so by denying it; so no answer ends anything here.
    """
    folder = url.rpartition("/")[0]
    if _FAILED_PROBES[folder] >= _MOST_FAILED_PROBES:
        return None
    try:
        data = read_small(f"{url}.idx.npz", _LARGEST_SIDE_CAR, attempts=cache.settings.attempts)
    except RemoteError as error:
        if isinstance(error, RemoteOutageError):
            _FAILED_PROBES[folder] += 1
        _LOGGER.warning("%s; the shard is scanned instead", error)
        return None
    return None if data is None else parse_side_car(io.BytesIO(data), url, made_for)


def _scan_copy(url: str, cache: ShardCache) -> ShardIndex:
    """Scan the copy in the cache, which another process may evict meanwhile."""
    descriptor = cache.open(url)
    try:
        return _scan(f"/dev/fd/{descriptor}", redact(url))
    finally:
        os.close(descriptor)


def _scan(path: str, name: str, doubt: Callable[[], str] = lambda: "") -> ShardIndex:
    """Scan a local file; texts about it call it ``name``.

    Args:
        path: file.
        name: of the shard.
        doubt: says why one that has no end marker, but whole members, is damaged all the same.
    """
    try:
        found = scan_tar(path)
    except DamagedTarError as error:
        return build_index(name, error.members, damage=str(error).replace(path, name))
    index = build_index(name, found.members, note=found.note)
    reason = "" if found.has_end or index.damage else doubt()
    return replace(index, damage=f"shard {name!r} is cut short: {reason}") if reason else index


def _sign_of_a_cut(path: str, identity: dict[str, str | int]) -> str:
    """Say what tells that a shard without an end marker held more once; empty if nothing does."""
    before = max(size_when_indexed(place, str(identity["name"])) for place in side_car_places(path))
    if before > int(identity["size"]):
        return f"it has {identity['size']} bytes, and had {before} when it was indexed before"
    return ""
