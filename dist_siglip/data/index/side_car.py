"""The index of a shard as a file.

It lies beside the shard as ``<shard>.idx.npz``, or in the user's cache folder where that is closed:
plain arrays without pickles, written beside their final name and renamed, so readers never see half
of one. A side-car may come from anywhere and is believed only if it fits the shard.
"""

import hashlib
import json
import logging
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dist_siglip.data.index.shard_index import ShardIndex
from dist_siglip.data.remote.locations import redact
from dist_siglip.system.atomic import open_atomically, user_cache_folder
from dist_siglip.system.regular_file import open_regular

_LOGGER = logging.getLogger(__name__)
SIDE_CAR_VERSION = 1
_BLOCK = 512
_LONGEST_END = _BLOCK + 1024 + 10_240  # bytes that tar writers leave behind the last member
_LONGEST_NOTE = 1000
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
    """Return how many bytes a shard had when a side-car was made for it; 0 if nothing tells.

    Args:
        side_car: place of the side-car.
        name: file name of the shard.
    """
    try:
        with open_regular(side_car) as file, np.load(file, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
        return int(header["size"]) if header["name"] == name else 0
    except _DAMAGE:
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
    except _DAMAGE:
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
    return size % _BLOCK != 0 or size - last > _LONGEST_END


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
