"""Which samples does a shard hold, and where? The answer is kept beside the shard.

A sample is what webdataset calls one: the members whose names agree up to the first dot of the
base name. ``read_index`` reads the side-car ``<shard>.idx.npz`` if it was made for exactly this
file (name, size and modification time), else it scans the headers and writes the side-car; in a
folder that cannot be written, the side-car goes to the user's cache folder. A side-car is plain
arrays without pickles, written beside its final name and renamed, so readers never see half of one.

A damaged shard has an index too, of what is whole before the damage, but leaves no side-car;
``load_index`` refuses it.
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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dist_siglip.atomic import open_atomically
from dist_siglip.data.remote import RemoteError, ShardCache, is_remote
from dist_siglip.data.remote.locations import redact, shard_name
from dist_siglip.data.remote.transfer import describe_remote, read_small
from dist_siglip.data.tar_scan import DamagedTarError, Member, scan_tar
from dist_siglip.errors import UserError

_LOGGER = logging.getLogger(__name__)
_VERSION = 1
# What reading a damaged side-car raises: no archive, a broken one, entries missing or misshapen.
_DAMAGE = (
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
_LARGEST_SIDE_CAR = 1 << 28
_SEPARATOR = "\0"  # cannot occur in the name of a member


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardIndex:
    """Every member of every sample of one shard.

    Attributes:
        path: the shard.
        num_samples: samples of the shard, numbered in order of first appearance.
        extensions: the extensions that occur, lower case, without the leading dot.
        joined_keys: (bytes,) uint8, all keys joined by NUL: a quarter of the size of a list.
        samples: (members,) int64, the sample each member belongs to.
        kinds: (members,) int64, its extension, as an index of ``extensions``.
        offsets: (members,) int64, its first byte in the shard.
        sizes: (members,) int64, its length in bytes.
        digest: hash of all of the above but the path, for telling changed data.
        damage: what is wrong with the shard, in one line; empty for a sound one.
    """

    path: str
    num_samples: int
    extensions: tuple[str, ...]
    joined_keys: NDArray[np.uint8]
    samples: NDArray[np.int64]
    kinds: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    digest: str
    damage: str = ""

    def keys(self) -> list[str]:
        """List the keys of the samples, in sample order."""
        joined = self.joined_keys.tobytes().decode("utf-8", "surrogateescape")
        return joined.split(_SEPARATOR) if self.num_samples else []


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member name into key and extension, at the first dot of the base name.

    Returns:
        (key, lower-case extension), or None for what webdataset skips: hidden files, names without
        extension, and ``__meta__`` entries.

    Example:
        >>> split_name("a.b/0001.v2.JPG")
        ('a.b/0001', 'v2.jpg')
        >>> split_name("README") is None
        True
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base:
        return None
    top = name.split("/", 1)[0]
    if top.startswith("__") and top.endswith("__") and len(top) > 4:
        return None
    return name[:dot], name[dot + 1 :].lower()


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
        UserError: if a remote shard cannot be fetched, or there is no cache for it.
    """
    if is_remote(path):
        return _read_remote(path, rebuild, cache)
    status = os.stat(path)
    identity: dict[str, str | int] = {
        "version": _VERSION,
        "name": os.path.basename(path),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    for side_car in () if rebuild else _side_cars(path):
        index = _read_side_car(side_car, path, identity)
        if index is not None:
            return index
    index = _scan(path, path)
    for side_car in () if index.damage else _side_cars(path):
        if _write_side_car(side_car, index, identity):
            break
    return index


def _read_remote(url: str, rebuild: bool, cache: ShardCache | None) -> ShardIndex:
    """Return the index of a remote shard."""
    if cache is None:
        raise UserError(f"shard {redact(url)!r} is remote, and there is no cache for it")
    try:
        remote = describe_remote(url, attempts=cache.settings.attempts)
        name = shard_name(url)
        made_for: dict[str, str | int] = {"version": _VERSION, "name": name, "size": remote.size}
        identity = {**made_for, "etag": remote.etag or ""}
        place = os.path.join(_cache_folder(), f"{_digest_of(url)}-{name[-80:]}.idx.npz")
        index = None if rebuild else _read_side_car(place, url, identity)
        if index is not None:
            return index
        if not rebuild and not set("?#") & set(url):
            beside = read_small(f"{url}.idx.npz", _LARGEST_SIDE_CAR, attempts=1)
            if beside is not None:
                index = _parse(io.BytesIO(beside), url, made_for)
        if index is None:
            index = _scan(cache.fetch(url), redact(url))
    except RemoteError as error:
        raise UserError(f"{error}; check the address and the network") from error
    index = replace(index, path=url)
    if not index.damage:
        _write_side_car(place, index, identity)
    return index


def _scan(path: str, name: str) -> ShardIndex:
    """Scan a local file; texts about it call it ``name``."""
    try:
        return build_index(name, scan_tar(path))
    except DamagedTarError as error:
        return build_index(name, error.members, damage=str(error).replace(path, name))


def build_index(path: str, members: list[Member], *, damage: str = "") -> ShardIndex:
    """Group the members of a shard into samples.

    Members of one sample need not stand next to each other. Of two members of one name the first
    counts, and the shard is damaged.

    Args:
        path: the shard.
        members: in file order.
        damage: what is known to be wrong with it.
    """
    rows: dict[str, int] = {}
    kinds: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    table: list[tuple[int, int, int, int]] = []
    for member in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        key, extension = parts
        place = (rows.setdefault(key, len(rows)), kinds.setdefault(extension, len(kinds)))
        if place in seen:
            damage = damage or (
                f"shard {path!r} holds member {member.name!r} twice; every key may occur once a "
                "shard: write the shard again"
            )
            continue
        seen.add(place)
        table.append((*place, member.offset, member.size))
    columns = np.array(table, dtype=np.int64).reshape(-1, 4).T.copy()
    joined = _SEPARATOR.join(rows).encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(list(kinds)).encode() + b"\0" + joined + b"\0")
    digest.update(columns.astype("<i8").tobytes())
    return ShardIndex(
        path=path,
        num_samples=len(rows),
        extensions=tuple(kinds),
        joined_keys=np.frombuffer(joined, dtype=np.uint8),
        samples=columns[0],
        kinds=columns[1],
        offsets=columns[2],
        sizes=columns[3],
        digest=digest.hexdigest(),
        damage=damage,
    )


def _side_cars(path: str) -> Iterator[str]:
    """Name the places of the side-car, best first."""
    yield f"{path}.idx.npz"
    name = f"{_digest_of(os.path.realpath(path))}-{os.path.basename(path)}.idx.npz"
    yield os.path.join(_cache_folder(), name)


def _cache_folder() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "dist_siglip", "index")


def _digest_of(place: str) -> str:
    return hashlib.blake2b(os.fsencode(place), digest_size=8).hexdigest()


def _read_side_car(side_car: str, path: str, identity: dict[str, str | int]) -> ShardIndex | None:
    """Read a side-car; None if there is none, or it is damaged, or made for another file."""
    try:
        with open(side_car, "rb") as file:
            return _parse(file, path, identity)
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOGGER.warning("side-car %r cannot be read: %s", side_car, error)
        return None


def _parse(file: BinaryIO, path: str, identity: dict[str, str | int]) -> ShardIndex | None:
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
            )
        _check(index, int(header["size"]))
    except _DAMAGE:
        _LOGGER.warning("the side-car of shard %r is damaged; it is made again", redact(path))
        return None
    return index


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


def _write_side_car(side_car: str, index: ShardIndex, identity: dict[str, str | int]) -> bool:
    """Write a side-car beside its final name and rename it; False if the place is closed."""
    header = {
        **identity,
        "num_samples": index.num_samples,
        "extensions": index.extensions,
        "digest": index.digest,
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
