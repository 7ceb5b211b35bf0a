"""The index of a shard: read from its side-car, or made by a scan and kept.

The side-car lies beside the shard as ``<shard>.idx.npz``, or in the user's cache folder where that
cannot be written: plain arrays without pickles, written beside their final name and renamed. It is
believed only if it was made for exactly this file (name, size, modification time) and fits it.

A damaged shard has an index too, of what is whole before the damage, but leaves no side-car.

A Parquet file is its own index, in its footer. That of a remote one is asked for alone, and kept in
the user's cache folder as ``<shard>.footer``; the whole file is fetched where a server gives no
part of it, or where values are missing and the rows are to be named.
"""

import hashlib
import io
import json
import logging
import os
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dist_siglip.data.index.shard_index import ShardIndex, build_index
from dist_siglip.data.index.table_rows import TableRows
from dist_siglip.data.index.tar_scan import BLOCK, DamagedTarError, scan_tar
from dist_siglip.data.parquet import ParquetError
from dist_siglip.data.parquet.footer import (
    LARGEST_FOOTER,
    TAIL,
    ParquetFooter,
    footer_length,
    parse_footer,
)
from dist_siglip.data.parquet.rows import ParquetRows
from dist_siglip.data.parquet.scan import Wanted, damaged_parquet, index_parquet
from dist_siglip.data.remote import RemoteError, RemoteOutageError, ShardCache, is_remote
from dist_siglip.data.remote.connections import RemoteRefusalError
from dist_siglip.data.remote.locations import is_parquet, is_table, redact, shard_name
from dist_siglip.data.remote.transfer import describe_remote, read_small, read_tail
from dist_siglip.errors import UserError
from dist_siglip.system.atomic import open_atomically, user_cache_folder
from dist_siglip.system.regular_file import descriptor_of, open_regular

_LOGGER = logging.getLogger(__name__)
SIDE_CAR_VERSION = 1
_LONGEST_END = BLOCK + 1024 + 10_240  # bytes that tar writers leave behind the last member
_LONGEST_NOTE = 1000
_LONGEST_HEADER = 1 << 16  # bytes
# What reading damaged arrays raises: no archive, a broken one, entries missing or misshapen.
DAMAGED_ARRAYS = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,  # encrypted, compressed in an unknown way, nested too deeply
    MemoryError,
    OverflowError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def side_car_places(path: str) -> Iterator[str]:
    """Name the places of the side-car, best first."""
    yield f"{path}.idx.npz"
    name = f"{digest_of(os.path.realpath(path))}-{os.path.basename(path)}.idx.npz"
    yield os.path.join(index_folder(), name)


def index_folder() -> str:
    """Name the folder for side-cars in the user's cache."""
    return user_cache_folder("index")


def digest_of(place: str) -> str:
    """Return 16 hexadecimal digits that tell places apart."""
    return hashlib.blake2b(os.fsencode(place), digest_size=8).hexdigest()


def read_side_car(side_car: str, path: str, identity: dict[str, str | int]) -> ShardIndex | None:
    """Read a side-car; None if there is none, or it is damaged, or made for another file."""
    try:
        with open_regular(side_car) as file:
            return parse_side_car(file, path, identity)
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOGGER.warning("side-car %r cannot be read: %s", side_car, error)
        return None


def size_when_indexed(side_car: str, name: str) -> int:
    """Return how many bytes a shard had when a side-car was made for it; 0 if nothing tells."""
    try:
        with open_regular(side_car) as file, np.load(file, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
        return int(header["size"]) if header["name"] == name else 0
    except DAMAGED_ARRAYS:
        return 0


def parse_side_car(file: BinaryIO, path: str, identity: dict[str, str | int]) -> ShardIndex | None:
    """Parse a side-car; None if it is damaged, or made for another file.

    Its arrays are stored as they are, so they take no more memory than the file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("a side-car is not compressed")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            if {key: header[key] for key in identity} != identity:
                return None
            columns = arrays["members"]
            index = ShardIndex(
                path=path,
                num_samples=int(header["num_samples"]),
                extensions=tuple(str(extension) for extension in header["extensions"]),
                joined_keys=arrays["keys"],
                samples=columns[0],
                kinds=columns[1],
                offsets=columns[2],
                sizes=columns[3],
                digest=str(header["digest"]),
                note=_printable(str(header.get("note", ""))),
            )
        _check(index, int(header["size"]))
        if "looked_behind_end" not in header and _has_long_end(index, int(header["size"])):
            return None
    except DAMAGED_ARRAYS:
        _LOGGER.warning("the side-car of shard %r is damaged; it is made again", redact(path))
        return None
    return index


def _printable(text: str) -> str:
    """Take what a terminal does not obey, and no more than a line of it."""
    return "".join(c if c.isprintable() else "?" for c in text[:_LONGEST_NOTE])


def _has_long_end(index: ShardIndex, size: int) -> bool:
    """Tell whether more lies behind the last member than tar writers leave there.

    Earlier versions did not look at what is behind the first block of zeros.
    """
    last = int((index.offsets + index.sizes).max()) if index.offsets.size else 0
    return size % BLOCK != 0 or size - last > _LONGEST_END


def _check(index: ShardIndex, size: int) -> None:
    """Refuse a side-car that no shard of ``size`` bytes can have; it may come from anywhere.

    Raises:
        ValueError: if a number is out of its range, or arrays do not fit together.
    """
    columns = (index.samples, index.kinds, index.offsets, index.sizes)
    arrays = (*columns, index.joined_keys)
    types = [array.dtype for array in arrays]
    if types != [np.int64] * 4 + [np.uint8] or any(array.ndim != 1 for array in arrays):
        raise ValueError("members are not (4, n) int64, or keys are no bytes")
    num_keys = int(np.count_nonzero(index.joined_keys == 0)) + 1 if index.joined_keys.size else 0
    if index.num_samples != num_keys or len(index.digest) != 32:
        raise ValueError(f"{num_keys} keys for {index.num_samples} samples")
    ends = (index.num_samples, len(index.extensions), size + 1, size + 1)
    for column, end in zip(columns, ends, strict=True):
        if column.size and not 0 <= column.min() <= column.max() < end:
            raise ValueError("a member is out of range")


def write_side_car(side_car: str, index: ShardIndex, identity: dict[str, str | int]) -> bool:
    """Write a side-car beside its final name and rename it; False if the place is closed."""
    header = {
        **identity,
        "num_samples": index.num_samples,
        "extensions": index.extensions,
        "digest": index.digest,
        "note": index.note,
        "looked_behind_end": True,
    }
    try:
        with open_atomically(Path(side_car), sync=False) as file:
            np.savez(
                file,
                header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
                members=np.stack([index.samples, index.kinds, index.offsets, index.sizes]),
                keys=index.joined_keys,
            )
    except OSError as error:
        _LOGGER.debug("no side-car at %r: %s", side_car, error)
        return False
    return True


_LARGEST_SIDE_CAR = 1 << 28
# Side-cars of a remote folder that this process asked for without an answer; then it asks no more.
_FAILED_PROBES: Counter[str] = Counter()
_MOST_FAILED_PROBES = 3


def read_index(
    path: str,
    *,
    rebuild: bool = False,
    cache: ShardCache | None = None,
    wanted: Wanted | None = None,
) -> ShardIndex:
    """Return the index of a shard from its side-car, or build it and leave a side-car.

    A remote shard is asked for its size and tag. Its side-car lies in the user's cache folder;
    where there is none, the side-car beside the remote shard is taken if it was made for a file of
    this name and size; else the shard is fetched and scanned. A table of rows is read whole, and
    leaves no side-car.

    Args:
        path: file or URL.
        rebuild: look at no side-car.
        cache: copies of remote shards.
        wanted: of a Parquet file, the columns that count; None for all, as they are.

    Raises:
        OSError: if the shard cannot be read.
        UserError: if a table is broken or a picture of it lies outside of its folder, if a remote
            shard is missing or denied, or there is no cache for it.
        OutageError: if its server does not answer.
    """
    if is_remote(path):
        return _read_remote(path, rebuild, cache, wanted)
    if is_parquet(path):
        return _read_parquet(path, path, lambda: descriptor_of(path), wanted)
    if is_table(path):
        return TableRows(path).index(path)
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


def _read_parquet(
    path: str,
    name: str,
    open_file: Callable[[], int],
    wanted: Wanted | None,
    footer: ParquetFooter | None = None,
) -> ShardIndex:
    """Index a Parquet file by its footer; the file is opened if more must be known."""
    descriptors: list[int] = []

    def opened() -> int:
        if not descriptors:
            descriptors.append(open_file())
        return descriptors[0]

    try:
        footer = footer or parse_footer(opened())
        index = index_parquet(name, footer, lambda: ParquetRows(opened()), wanted)
        return replace(index, path=path)
    except ParquetError as error:
        return replace(damaged_parquet(name, error), path=path)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _remote_footer(url: str, size: int, identity: dict[str, str | int]) -> ParquetFooter | None:
    """Return the footer of a remote file of a size, kept or asked for now; None if it is not had.

    What is kept is believed as a side-car is.
    """
    name = f"{digest_of(url)}-{shard_name(url)[-80:]}.footer"
    place = os.path.join(index_folder(), name)
    try:
        with open_regular(place) as file:
            header = json.loads(file.readline(_LONGEST_HEADER))
            footer = file.read(LARGEST_FOOTER)
        if header == identity:
            return ParquetFooter(footer, size)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _LOGGER.warning("%r is damaged (%s) and asked for again", place, error)
    try:
        tail = read_tail(url, size, min(size, TAIL))
        length = footer_length(tail, size)
        if length + 8 > len(tail):
            tail = read_tail(url, size, length + 8)
    except RemoteError as error:
        _LOGGER.info("%s; the whole file is fetched instead", error)
        return None
    found = ParquetFooter(tail[-length - 8 : -8], size)
    try:
        with open_atomically(Path(place), sync=False) as file:
            file.write(json.dumps(identity).encode() + b"\n" + tail[-length - 8 : -8])
    except OSError as error:
        _LOGGER.debug("no footer at %r: %s", place, error)
    return found


def _read_remote(
    url: str, rebuild: bool, cache: ShardCache | None, wanted: Wanted | None
) -> ShardIndex:
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
        if is_parquet(url):
            open_copy = partial(cache.open, url)
            try:
                footer = _remote_footer(url, remote.size, identity) if remote.size >= 0 else None
            except ParquetError as error:
                return replace(damaged_parquet(redact(url), error), path=url)
            return _read_parquet(url, redact(url), open_copy, wanted, footer)
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
