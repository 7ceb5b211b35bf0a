"""A CSV, TSV or JSONL file of paths and captions as a shard, for small sets that nobody packed.

A row is a sample, and its members are those of a tar: the picture under the extension of its path,
each column of texts under its name, the row as ``json``, and the usual column of captions as
``txt``. The offset of a member is its address here: a check number of the table, the row, and the
kind of the member. The rows stay in memory. Pictures lie in the folder of the table; nothing that a
path or a link names outside of it is opened.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_siglip.data.index.shard_index import ShardIndex, index_of_members
from dist_siglip.data.packing.table import (
    DELIMITERS,
    PICTURE_COLUMNS,
    read_csv,
    read_json_lines,
    resolve,
)
from dist_siglip.data.parquet.footer import STAND_INS
from dist_siglip.data.samples.picture_policy import EXTENSIONS_OF
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import open_regular

_LARGEST_TABLE = 1 << 26  # bytes, which every process holds in memory
_LARGEST_PICTURE = 1 << 28  # as the reader of tars
_KINDS = 1 << 12  # kinds of members of a table
_ROWS = 1 << 32
_RESERVED = frozenset({"json", *(each for found in EXTENSIONS_OF.values() for each in found)})


class TableError(Exception):
    """A row that cannot be read any more; the text says why."""


class _Row(NamedTuple):
    """Extension of the picture and its path as it stands there, and the other members."""

    extension: str
    picture: str
    members: dict[str, bytes]


class TableRows:
    """The rows of a table, in memory.

    Args:
        path: .csv, .tsv, .jsonl or .ndjson.

    Raises:
        UserError: if it is broken, too large, or has no column of pictures.
        OSError: if it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._folder = os.path.dirname(path) or "."
        with open_regular(path) as file:
            data = file.read(_LARGEST_TABLE + 1)
        if len(data) > _LARGEST_TABLE:
            raise UserError(
                f"table {path!r} has more than {_LARGEST_TABLE >> 20} MiB, which every process "
                "would hold in memory; write shards of it: dist-siglip data pack"
            )
        self._digest = hashlib.blake2b(data, digest_size=16).digest()
        self._check_number = int.from_bytes(self._digest[:2], "little") & 0x7FFF
        self._rows: list[_Row | None] = list(_read_rows(path))
        kinds: dict[str, None] = {}
        for row in self._rows:
            if row is not None:
                kinds |= dict.fromkeys(filter(None, (row.extension, *row.members)))
        self._kinds = tuple(kinds)
        if len(self._kinds) > _KINDS:
            raise UserError(f"table {path!r} has more than {_KINDS} columns")

    def index(self, path: str) -> ShardIndex:
        """Describe the members, those pictures among them that are there.

        Raises:
            UserError: if a picture lies outside of the folder.
        """
        place_of = {kind: number for number, kind in enumerate(self._kinds)}
        first = self._check_number * _ROWS * _KINDS
        found: list[tuple[int, int, int, int]] = []
        lost: list[str] = []
        for number, row in enumerate(self._rows):
            if row is None:
                continue
            sizes = {kind: len(data) for kind, data in row.members.items()}
            size = self._size_of_picture(path, number, row.picture) if row.extension else None
            if size is not None:
                sizes[row.extension] = size
            elif row.extension:
                lost.append(f"{row.picture!r} of row {number}")
            for kind, length in sizes.items():
                place = place_of[kind]
                found.append((number, place, first + number * _KINDS + place, length))
        keys = [f"{number:09d}" for number in range(len(self._rows))]
        columns = np.array(found, dtype=np.int64).reshape(-1, 4).T.copy()
        index = index_of_members(path, keys, self._kinds, columns, self._digest)
        if not lost:
            return index
        return replace(index, note=f"{len(lost)} pictures are not there, first {lost[0]}")

    def read(self, address: int) -> bytes:
        """Return a member.

        Raises:
            TableError: if the table has changed since it was indexed, or the picture lies outside.
            OSError: if the picture cannot be read.
        """
        rest, place = divmod(address, _KINDS)
        check_number, number = divmod(rest, _ROWS)
        row = self._rows[number] if number < len(self._rows) else None
        if check_number != self._check_number or row is None or place >= len(self._kinds):
            raise TableError("the table has changed since it was indexed")
        kind = self._kinds[place]
        if kind in row.members:
            return row.members[kind]
        try:
            real, is_inside = resolve(self._folder, row.picture)
        except ValueError as error:
            raise TableError(str(error)) from error
        if not is_inside:
            raise TableError(f"picture {row.picture!r} lies outside of the folder of the table")
        with open_regular(real) as file:
            return file.read(_LARGEST_PICTURE + 1)

    def _size_of_picture(self, path: str, number: int, picture: str) -> int | None:
        """Bytes of a picture; None if there is no such file."""
        try:
            real, is_inside = resolve(self._folder, picture)
        except ValueError:  # a NUL, or what no file name can hold
            return None
        if not is_inside:
            raise UserError(
                f"picture {picture!r} of row {number} of table {path!r} lies outside of its "
                "folder; correct the table, or write shards: dist-siglip data pack has "
                "--allow_outside"
            )
        return os.path.getsize(real) if os.path.isfile(real) else None


def _read_rows(path: str) -> Iterator[_Row | None]:
    """Read the rows; None stands for one that cannot be read."""
    table, suffix = Path(path), os.path.splitext(path)[1].lower()
    picture: str | None = None
    raw = read_csv(table, DELIMITERS[suffix]) if suffix in DELIMITERS else read_json_lines(table)
    for values in raw:
        if isinstance(values, str):
            yield None
            continue
        if picture is None:
            picture = next((name for name in PICTURE_COLUMNS if name in values), None)
        if picture is None:
            raise UserError(
                f"table {path!r} has no column of pictures ({', '.join(PICTURE_COLUMNS)}); it has "
                f"{', '.join(map(str, list(values)[:20]))}: rename one, or write shards: "
                "dist-siglip data pack has --image_column"
            )
        place = values.get(picture)
        extension = os.path.splitext(place)[1][1:].lower() if isinstance(place, str) else ""
        if not isinstance(place, str) or extension not in _RESERVED - {"json"}:
            yield _Row("", "", _members(values))
            continue
        yield _Row(extension, place, _members(values))


def _members(values: Mapping[str, Any]) -> dict[str, bytes]:
    """Name the texts of a row, and the row."""
    texts: dict[str, bytes] = {}
    for column, value in values.items():
        name = column.lower()
        if name in _RESERVED or "." in name or not name:
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str):
            texts.setdefault(name, value.encode("utf-8", "surrogatepass"))
    for alias, columns in STAND_INS.items():
        usual = next((name for name in columns if name in texts), None)
        if alias not in texts and usual is not None:
            texts[alias] = texts[usual]
    return {**texts, "json": json.dumps(values).encode()}
