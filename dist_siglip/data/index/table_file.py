"""How does a table of ten million samples come back in milliseconds?

As flat arrays in one file of the user's cache folder, mapped into memory: all ranks and loader
processes of a node share its pages, and only those that are touched are read. A file belongs to
exactly these shards (place, size, modification time) and settings, holds plain numbers and a JSON
header, and is written whole or not at all. It can be deleted at any time.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dist_siglip.system.atomic import open_atomically, user_cache_folder
from dist_siglip.system.regular_file import open_regular

_LOGGER = logging.getLogger(__name__)
_MAGIC = b"dist_siglip table 2\n"
_ALIGNMENT = 64  # bytes
_KEPT = 16  # tables; those unused for longest go

Arrays = dict[str, NDArray[np.int64]]


def table_path(shards: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Name the file of a table.

    Args:
        shards: local files.
        settings: everything else the table depends on, as plain values.

    Raises:
        OSError: if a shard is missing.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_MAGIC + json.dumps(settings, sort_keys=True).encode() + b"\n")
    for shard in shards:
        status = os.stat(shard)
        place = os.fsencode(os.path.abspath(shard))
        digest.update(b"%s\0%d\0%d\n" % (place, status.st_size, status.st_mtime_ns))
    return os.path.join(user_cache_folder("tables"), f"{digest.hexdigest()}.table")


def write_table(path: str, arrays: Arrays, values: Mapping[str, Any]) -> bool:
    """Write arrays and plain values; False if the folder is closed or full."""
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    position = 0
    for name, array in arrays.items():
        places[name] = (position, array.shape)
        position += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps({"arrays": places, "bytes": position, "values": dict(values)}).encode()
    try:
        with open_atomically(Path(path)) as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            file.write(bytes(-file.tell() % _ALIGNMENT))
            for array in arrays.values():
                data = np.ascontiguousarray(array, dtype="<i8")
                file.write(data.data if data.size else b"")
                file.write(bytes(-data.nbytes % _ALIGNMENT))
    except OSError as error:
        _LOGGER.debug("no table at %r: %s", path, error)
        return False
    _forget_old(os.path.dirname(path))
    return True


def read_table(path: str) -> tuple[Arrays, dict[str, Any]] | None:
    """Map the arrays of a table; None if there is none, or it is damaged."""
    try:
        with open_regular(path) as file:
            found = _parse(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        _LOGGER.warning("table %r is damaged (%s) and will be made again", path, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


def _parse(file: BinaryIO) -> tuple[Arrays, dict[str, Any]]:
    size = os.fstat(file.fileno()).st_size
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("no table")
    length = int.from_bytes(file.read(8), "little")
    if length > size:
        raise ValueError("cut short")
    header = json.loads(file.read(length))
    start = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
    if size != start + header["bytes"]:
        raise ValueError("cut short")
    arrays = {
        str(name): _map(file.name, start + int(offset), tuple(map(int, shape)))
        for name, (offset, shape) in header["arrays"].items()
    }
    return arrays, dict(header["values"])


def _map(path: str, offset: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
    if not np.prod(shape):
        return np.zeros(shape, dtype=np.int64)
    return np.memmap(path, dtype="<i8", mode="r", offset=offset, shape=shape)


def _forget_old(folder: str) -> None:
    """Delete the tables unused for longest."""
    with contextlib.suppress(OSError):
        tables = [entry for entry in os.scandir(folder) if entry.name.endswith(".table")]
        tables.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry in tables[_KEPT:]:
            os.unlink(entry.path)
