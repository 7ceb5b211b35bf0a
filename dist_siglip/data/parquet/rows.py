"""Cells of a Parquet file by the number of their row, as the bytes of members of a tar.

Pictures and texts are found page by page; the other columns of a row (numbers, lists, objects) are
decoded by pyarrow, a row group at a time. What was found last is kept, up to a number of bytes. A
row also stands for a ``.json`` member: its columns that hold no bytes, or those of them that are
asked for.
"""

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.parquet import ParquetError, UnknownEncodingError, one_line
from dist_siglip.data.parquet.footer import (
    ODD_CODEC,
    Column,
    ParquetFooter,
    packages,
    parse_footer,
)
from dist_siglip.data.parquet.pages import (
    DELTA_BYTE_ARRAY,
    LARGEST_PAGE,
    MOST_VALUES,
    Page,
    Values,
    is_dictionary,
    list_pages,
    read_presence,
    read_values,
)

_KEPT_BYTES = 1 << 26  # of a reader
_COLUMN_BIT = 40  # of an address; rows are below
_PAGE_BYTES = 200  # of memory that a page of a list takes
_VALUE_BYTES = 64  # of memory that a value of a list takes as an object


class TextList(bytes):
    """A JSON list of the texts of one cell."""


def address(column: int, row: int | NDArray[np.int64]) -> Any:
    """Join a column and a row to the offset of a member; the column behind the last is the JSON."""
    return (column << _COLUMN_BIT) + row


_Made = TypeVar("_Made")


class Kept:
    """Values used last, up to a number of bytes.

    Args:
        most: bytes.
    """

    def __init__(self, most: int = _KEPT_BYTES) -> None:
        self._most = most
        self._bytes = 0
        self._found: OrderedDict[tuple[Any, ...], tuple[Any, int]] = OrderedDict()

    def get(
        self, key: tuple[Any, ...], make: Callable[[], _Made], size: Callable[[_Made], int]
    ) -> _Made:
        """Return a value, made now if it is not there.

        Args:
            key: of the value.
            make: makes it.
            size: bytes that it takes.
        """
        if key in self._found:
            self._found.move_to_end(key)
            found: _Made = self._found[key][0]
            return found
        made = make()
        num_bytes = size(made)
        self._found[key] = made, num_bytes
        self._bytes += num_bytes
        while self._bytes > self._most and len(self._found) > 1:
            self._bytes -= self._found.popitem(last=False)[1][1]
        return made

    def forget(self, shard: str) -> None:
        """Drop what was kept of a file; one of this name may have other bytes later."""
        for key in [key for key in self._found if key[0] == shard]:
            self._bytes -= self._found.pop(key)[1]


class _Pages(NamedTuple):
    """The pages of a chunk: the dictionary if there is one, the others, and where those begin."""

    dictionary: Page | None
    data: list[Page]
    firsts: list[int]


class ParquetRows:
    """Reads cells of one open file.

    Args:
        descriptor: of the file; stays open.
        kept: for values found before, which several files share.
        shard: its name there.
        fields: of rows, as ``data.captions`` names them ("seo.alt"): columns that their JSON has;
            None for all.

    Raises:
        ParquetError: if the footer is damaged.
        UserError: if pyarrow is missing.
    """

    def __init__(
        self,
        descriptor: int,
        kept: Kept | None = None,
        *,
        shard: str = "",
        fields: Collection[str] | None = None,
    ) -> None:
        self.footer: ParquetFooter = parse_footer(descriptor)
        self._descriptor = descriptor
        self._kept = kept or Kept()
        self._shard = shard
        self._of_json = [
            number
            for number, column in enumerate(self.footer.columns)
            if (not column.holds_bytes if fields is None else _is_asked_for(column, fields))
        ]

    def read(self, offset: int) -> bytes:
        """Return a cell: bytes, or a text or number in UTF-8, or several texts as a ``TextList``.

        Args:
            offset: as ``address`` makes it.

        Raises:
            ParquetError: if there is no such cell, it cannot be read, or has no picture.
        """
        number, row = offset >> _COLUMN_BIT, offset & ((1 << _COLUMN_BIT) - 1)
        group = self.footer.group_of(row)
        place = row - self.footer.starts[group]
        if number >= len(self.footer.columns):
            return self._json(group, place)
        column = self.footer.columns[number]
        if column.value >= 0:
            data = self._bytes_of(group, number, place)
            if data is None and column.holds_bytes:
                raise ParquetError(f"column {column.name!r} holds nothing in row {row}")
            return data or b""
        return _as_member(self._value(group, number, place)[0], column)

    def present(self, group: int, number: int) -> NDArray[np.bool_]:
        """Tell which rows of a group have a value in a column that is read one by one."""
        leaf = self.footer.columns[number].value
        count = self.footer.starts[group + 1] - self.footer.starts[group]
        if not self.footer.num_nulls(group, leaf):
            return np.ones(count, dtype=bool)
        try:
            found = self._presence(group, number)
        except ParquetError:  # what is damaged shows when it is read
            return np.ones(count, dtype=bool)
        return found if len(found) == count else np.ones(count, dtype=bool)

    def _presence(self, group: int, number: int) -> NDArray[np.bool_]:
        leaf = self.footer.columns[number].value
        chunk, pages = self.footer.chunk(group, leaf), self._pages(group, leaf).data
        if chunk.codec == ODD_CODEC or any(page.encoding < 0 for page in pages):
            count = self.footer.starts[group + 1] - self.footer.starts[group]
            values = (self._decoded_bytes(group, number, place) for place in range(count))
            return np.array([value is not None for value in values])
        found = [read_presence(self._descriptor, chunk, page) for page in pages]
        return np.concatenate([np.zeros(0, dtype=bool), *found])

    def _bytes_of(self, group: int, number: int, place: int) -> bytes | None:
        """Return a value of a column that is read one by one; None for null."""
        leaf = self.footer.columns[number].value
        if self.footer.chunk(group, leaf).codec == ODD_CODEC:
            return self._decoded_bytes(group, number, place)
        pages = self._pages(group, leaf)
        page = bisect_right(pages.firsts, place) - 1
        if not 0 <= page < len(pages.data):
            raise ParquetError(f"row group {group} has no value {place}")
        key = (self._shard, "values", group, leaf, page)
        try:
            values = self._kept.get(key, lambda: self._values(group, leaf, page), _size_of)
            inside = place - pages.firsts[page]
            if inside >= len(values.sizes):
                raise ParquetError(f"row group {group} has no value {place}")
            return values.take(self._descriptor, inside)
        except UnknownEncodingError:
            return self._decoded_bytes(group, number, place)

    def _pages(self, group: int, leaf: int) -> _Pages:
        def listed() -> _Pages:
            found = list_pages(self._descriptor, self.footer.chunk(group, leaf))
            dictionary = found[0] if found and is_dictionary(found[0]) else None
            data = found[dictionary is not None :]
            return _Pages(dictionary, data, [page.first for page in data])

        key = (self._shard, "pages", group, leaf)
        return self._kept.get(key, listed, lambda pages: _PAGE_BYTES * len(pages.data))

    def _values(self, group: int, leaf: int, page: int) -> Values:
        chunk, pages = self.footer.chunk(group, leaf), self._pages(group, leaf)
        dictionary, first = None, pages.dictionary
        if first is not None:
            key = (self._shard, "dictionary", group, leaf)
            dictionary = self._kept.get(
                key, lambda: read_values(self._descriptor, chunk, first), _size_of
            )
        return read_values(self._descriptor, chunk, pages.data[page], dictionary)

    def _decoded_bytes(self, group: int, number: int, place: int) -> bytes | None:
        """Return a value as pyarrow decodes it."""
        value, _ = self._value(group, number, place)
        if isinstance(value, dict):
            value = value.get("bytes")
        if isinstance(value, str):
            value = value.encode()
        return value if isinstance(value, bytes) else None

    def _value(self, group: int, number: int, place: int) -> tuple[Any, int]:
        """Return a value as pyarrow decodes it, and about how many bytes it takes."""
        pyarrow, _ = packages()
        name = self.footer.columns[number].name
        cell = self._decoded(group, number).slice(place, 1)
        try:
            size = sum(_unfolded(chunk) for chunk in cell.chunks)
            if size <= LARGEST_PAGE:
                return cell[0].as_py(), size
        except (pyarrow.ArrowException, ValueError, OverflowError, LookupError) as error:
            raise ParquetError(f"column {name!r} cannot be read: {one_line(error)}") from None
        raise ParquetError(
            f"column {name!r} holds {size} bytes in one row, at most {LARGEST_PAGE} are read"
        )

    def _decoded(self, group: int, number: int) -> Any:
        """Return a column of a row group as pyarrow has it, if it is not too large."""
        key = (self._shard, "decoded", group, number)
        return self._kept.get(key, lambda: self._decode(group, number), _num_bytes)

    def _decode(self, group: int, number: int) -> Any:
        column, schema = self.footer.columns[number], self.footer.metadata.schema
        texts: list[str] = []
        for leaf in column.leaves:
            kind = schema.column(leaf)
            pages = list_pages(self._descriptor, self.footer.chunk(group, leaf))
            num_bytes = sum(page.full_size for page in pages)
            num_values = sum(page.num_values for page in pages if not is_dictionary(page))
            if kind.physical_type == "FIXED_LEN_BYTE_ARRAY":  # a reference may stand for each
                num_bytes = max(num_bytes, num_values * kind.length)
            if num_bytes > LARGEST_PAGE or num_values > MOST_VALUES:
                raise ParquetError(
                    f"column {column.name!r} has {num_values} values in {num_bytes} bytes in one "
                    f"row group, at most {MOST_VALUES} in {LARGEST_PAGE} are decoded; write "
                    "smaller row groups"
                )
            if any(page.encoding == DELTA_BYTE_ARRAY for page in pages):
                raise ParquetError(
                    f"column {column.name!r} is encoded as DELTA_BYTE_ARRAY, in which a few bytes "
                    "may stand for any number; write it PLAIN or with a dictionary"
                )
            if pages and is_dictionary(pages[0]) and kind.physical_type == "BYTE_ARRAY":
                # They stay references to their dictionary: a run of a few bytes stays small.
                texts.append(kind.path)
        pyarrow, parquet = packages()
        try:
            with (
                pyarrow.OSFile(f"/dev/fd/{self._descriptor}") as file,
                parquet.ParquetFile(
                    file,
                    metadata=self.footer.metadata,
                    read_dictionary=texts,
                    pre_buffer=False,
                    coerce_int96_timestamp_unit="us",
                ) as table,
            ):
                found = table.read_row_group(group, columns=[column.name], use_threads=False)
            values = in_microseconds(found.column(column.name))
        except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
            raise ParquetError(
                f"column {column.name!r} cannot be read: {one_line(error)}"
            ) from None
        if len(values) != self.footer.starts[group + 1] - self.footer.starts[group]:
            raise ParquetError(f"column {column.name!r} has {len(values)} rows in a row group")
        return values

    def _json(self, group: int, place: int) -> bytes:
        record: dict[str, Any] = {}
        total = 0
        for number in self._of_json:
            column = self.footer.columns[number]
            if column.value < 0 or len(column.leaves) > 1:
                value, size = self._value(group, number, place)
            else:
                data = self._bytes_of(group, number, place)
                size = len(data or b"")
                try:
                    value = None if data is None else data.decode()
                except UnicodeDecodeError as error:
                    raise ParquetError(
                        f"column {column.name!r} is not UTF-8: {error.reason}"
                    ) from None
            record[column.name] = value
            total += size
            if total > LARGEST_PAGE:
                raise ParquetError(f"row has more than {LARGEST_PAGE} bytes")
        try:
            return json.dumps(record, default=str).encode()
        except (ValueError, RecursionError) as error:
            raise ParquetError(f"row cannot be written as JSON: {one_line(error)}") from None


def _is_asked_for(column: Column, fields: Collection[str]) -> bool:
    """Tell whether one of some fields is, or is in, a column."""
    is_named = any(f == column.name or f.startswith(f"{column.name}.") for f in fields)
    return is_named and (not column.holds_bytes or len(column.leaves) == 1)


def _as_member(value: Any, column: Column) -> bytes:
    """Write a value of a column of other types than bytes and text."""
    if value is None:
        return b""
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, int | float):
        return str(value).encode()
    if isinstance(value, list):
        texts = [text for text in value if text is not None]
        if all(isinstance(text, str) for text in texts):
            return TextList(json.dumps(texts).encode())
    raise ParquetError(
        f"column {column.name!r} holds {type(value).__name__}, no text and no list of texts; name "
        "a field of it, with captions.members [json]"
    )


def _unfolded(array: Any) -> int:
    """Bytes that values take as objects, where each reference to a dictionary is a text."""
    from pyarrow import compute, types

    array = getattr(array, "storage", array)
    size, kind = _VALUE_BYTES * len(array), array.type
    if types.is_struct(kind):
        return size + sum(map(_unfolded, array.flatten()))
    if types.is_map(kind):
        first, last = (array.offsets[place].as_py() for place in (0, len(array)))
        parts = (array.keys, array.items)
        return size + sum(_unfolded(part.slice(first, last - first)) for part in parts)
    if types.is_nested(kind):
        return size + _unfolded(array.flatten())
    if types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary)
        return size + (compute.sum(lengths.take(array.indices)).as_py() or 0)
    return size + int(array.nbytes)


def in_microseconds(values: Any) -> Any:
    """Cut times of nanoseconds, which Python has no type for without pandas."""
    import pyarrow

    kind = values.type
    if getattr(kind, "unit", "") != "ns":
        return values
    if pyarrow.types.is_timestamp(kind):
        coarse = pyarrow.timestamp("us", kind.tz)
    elif pyarrow.types.is_duration(kind):
        coarse = pyarrow.duration("us")
    else:
        coarse = pyarrow.time64("us")
    return values.cast(coarse, safe=False)


def _size_of(values: Values) -> int:
    return values.nbytes


def _num_bytes(values: Any) -> int:
    return int(values.nbytes)
