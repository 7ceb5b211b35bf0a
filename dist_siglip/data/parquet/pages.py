"""Pages of one column of a row group, so that one value can be read without its neighbours.

Values of the type BYTE_ARRAY that stand alone or in a struct, not in a list, encoded PLAIN or by a
dictionary: texts and pictures as all common writers store them. Of a page that is not compressed,
only the lengths between the values are read; one of snappy is unpacked once to find them, and then
in pieces of 64 KiB; others are unpacked whole. What a page claims is compared with what is there,
and bounded, before memory is reserved.

pyarrow reads row groups, not rows. Of pictures of 96 KB, drawn at random with 64 MiB kept, its
``read_row_group(columns=...)`` gives 477 a second of processor time from row groups of 100, and 39
from those of 1,000; this gives 29,000 and 26,500, a tar some 31,000 (docs/benchmarks.md).

Page headers are structs of Thrift's compact protocol. See the Parquet format, "Data Pages".
"""

import os
import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.parquet import ParquetError, UnknownEncodingError, one_line
from dist_siglip.data.parquet.snappy import SnappyFragments, find_fragments

LARGEST_PAGE = 1 << 28  # bytes, compressed or not; the longest member of a tar that is read
MOST_VALUES = 1 << 24  # of a page
_WINDOW = 1 << 12  # bytes in which a header is looked for
_LARGEST_HEADER = 1 << 20  # it may hold the least and the greatest value of its page
_DEEPEST = 8  # structs in structs
_MOST_EMPTY = 64  # pages of a chunk without a value
_UNPACKED = 1 << 16  # numbers unpacked at a time
_SPARSE = 1 << 11  # bytes of a mean value from which its neighbours are skipped, not read
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY = 0, 2, 3, 8
DELTA_BYTE_ARRAY = 7
_ENCODINGS = (_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY)  # of values


class Chunk(NamedTuple):
    """The column chunk of one leaf in one row group, as the footer has it.

    Attributes:
        offset: of its first page.
        size: bytes of its pages.
        num_values: with nulls.
        codec: name of the compression, as pyarrow has it; "" for none.
        max_level: definition level of a value that is not null.
        is_list: whether a row may have several values.
    """

    offset: int
    size: int
    num_values: int
    codec: str
    max_level: int
    is_list: bool = False


class Page(NamedTuple):
    """One page: where its body lies, and how it is encoded.

    Attributes:
        kind: of the page, a number of the format.
        offset: of its body.
        size: bytes of the body as stored.
        full_size: bytes of the body decompressed.
        num_values: with nulls.
        encoding: of the values, a number of the format; -1 where levels are stored in an old way.
        levels_size: bytes of levels in front that are not compressed, of version 2.
        is_compressed: whether the rest is compressed.
        first: values of the chunk before it.
    """

    kind: int
    offset: int
    size: int
    full_size: int
    num_values: int
    encoding: int
    levels_size: int
    is_compressed: bool
    first: int


class Values(NamedTuple):
    """Values of a page.

    Attributes:
        held: bytes they lie in; None: in the file itself.
        offsets: (values,) int64, where each begins.
        sizes: (values,) int64; -1 for null.
        fragments: of the page they are unpacked from one by one; None for other pages.
    """

    held: bytes | None
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    fragments: SnappyFragments | None = None

    @property
    def nbytes(self) -> int:
        """Memory they take."""
        num_starts = 0 if self.fragments is None else len(self.fragments.starts)
        return len(self.held or b"") + 16 * len(self.offsets) + 40 * num_starts

    def take(self, descriptor: int, place: int) -> bytes | None:
        """Return one value; None for null.

        Raises:
            UnknownEncodingError: if it cannot be unpacked alone.
            ParquetError: if the file became shorter.
        """
        offset, size = int(self.offsets[place]), int(self.sizes[place])
        if size < 0:
            return None
        if self.fragments is not None:
            return self.fragments.read(descriptor, offset, size)
        if self.held is not None:
            return self.held[offset : offset + size]
        return _read(descriptor, offset, size)


def list_pages(descriptor: int, chunk: Chunk) -> list[Page]:
    """List the pages of a chunk in file order, a dictionary first.

    Raises:
        ParquetError: if they are not what the footer says.
    """
    pages: list[Page] = []
    position, end, first = chunk.offset, chunk.offset + chunk.size, 0
    num_headers = 0
    while first < chunk.num_values:
        num_headers += 1
        if position >= end or num_headers > chunk.num_values + _MOST_EMPTY:
            raise ParquetError(f"its column chunk ends after {first} of {chunk.num_values} values")
        header, length = _read_header(descriptor, position, end)
        page = _page(header, position + length, first, chunk)
        position = page.offset + page.size
        if position > end:
            raise ParquetError("a page reaches beyond its column chunk")
        if page.kind == _DICTIONARY and (pages or page.encoding not in _ENCODINGS):
            raise ParquetError("a dictionary page is not the first one")
        if page.kind in (_DATA, _DATA_V2, _DICTIONARY):
            pages.append(page)
        if page.kind in (_DATA, _DATA_V2):
            first += page.num_values
    if first != chunk.num_values:
        raise ParquetError(f"pages hold {first} values, and the footer says {chunk.num_values}")
    return pages


def is_dictionary(page: Page) -> bool:
    """Whether a page holds what others refer to."""
    return page.kind == _DICTIONARY


def _page(header: dict[int, Any], offset: int, first: int, chunk: Chunk) -> Page:
    """Check and name the fields of a header."""
    kind, full_size, size = (_number(header, field) for field in (1, 2, 3))
    fields = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, 0), {})
    if not isinstance(fields, dict):
        raise ParquetError("a page header is damaged")
    num_values, levels_size, is_compressed = _number(fields, 1, 0), 0, bool(chunk.codec)
    encoding = _number(fields, 4 if kind == _DATA_V2 else 2, -1)
    if kind == _DATA_V2:
        levels_size, of_lists = _number(fields, 5, 0), _number(fields, 6, 0)
        is_compressed = is_compressed and bool(fields.get(7, True))
        if of_lists and not chunk.is_list:
            raise ParquetError("a page holds lists where there are none")
        levels_size += of_lists
    if kind == _DATA and chunk.max_level and fields.get(3, _RLE) != _RLE:
        encoding = -1
    if not (
        0 <= size <= LARGEST_PAGE
        and 0 <= levels_size <= min(size, full_size)
        and full_size <= LARGEST_PAGE
        and (is_compressed or size == full_size)
        and 0 <= num_values <= MOST_VALUES
    ):
        raise ParquetError(
            f"a page of {full_size} bytes ({size} stored) with {num_values} values; at most "
            f"{LARGEST_PAGE} bytes and {MOST_VALUES} values are read; write smaller row groups"
        )
    return Page(
        kind, offset, size, full_size, num_values, encoding, levels_size, is_compressed, first
    )


def _number(fields: dict[int, Any], field: int, default: int | None = None) -> int:
    """Return a number of a header."""
    found = fields.get(field, default)
    if not isinstance(found, int):
        raise ParquetError("a page header is damaged")
    return found


def read_values(
    descriptor: int, chunk: Chunk, page: Page, dictionary: Values | None = None
) -> Values:
    """Find, or decompress, the values of a page.

    Args:
        descriptor: of the file.
        chunk: the page is of.
        page: one of ``list_pages``.
        dictionary: values of the dictionary page, if the chunk has one.

    Raises:
        UnknownEncodingError: if it is encoded otherwise.
        ParquetError: if it is damaged.
    """
    if page.encoding not in _ENCODINGS:
        raise UnknownEncodingError(f"encoding {page.encoding} of a page is not read")
    if is_dictionary(page):
        return _plain_values(descriptor, chunk, page, page.num_values, 0, None)
    present, start, body = _presence(descriptor, chunk, page)
    count = page.num_values if present is None else int(present.sum())
    if page.encoding == _PLAIN:
        found = _plain_values(descriptor, chunk, page, count, start, body)
    else:
        if dictionary is None:
            raise ParquetError("a page refers to a dictionary, and there is none")
        body = _body(descriptor, chunk, page) if body is None else body
        width = body[start] if count and start < len(body) else 0
        indices = hybrid(body, start + 1, width, count)
        if count and indices.max(initial=0) >= len(dictionary.sizes):
            raise ParquetError("a page refers to more than its dictionary holds")
        found = dictionary._replace(
            offsets=dictionary.offsets[indices], sizes=dictionary.sizes[indices]
        )
    if present is None or count == page.num_values:
        return found
    offsets = np.zeros(page.num_values, dtype=np.int64)
    sizes = np.full(page.num_values, -1, dtype=np.int64)
    offsets[present], sizes[present] = found.offsets, found.sizes
    return found._replace(offsets=offsets, sizes=sizes)


def read_presence(descriptor: int, chunk: Chunk, page: Page) -> NDArray[np.bool_]:
    """Tell which values of a data page are not null.

    Raises:
        ParquetError: if it is damaged.
    """
    present, _, _ = _presence(descriptor, chunk, page)
    return np.ones(page.num_values, dtype=bool) if present is None else present


def _presence(
    descriptor: int, chunk: Chunk, page: Page
) -> tuple[NDArray[np.bool_] | None, int, bytes | None]:
    """Read definition levels: who is there, where values begin, and the body if it was needed."""
    if not chunk.max_level:
        return None, page.levels_size, None
    body, start, end = None, 0, page.levels_size
    if page.kind == _DATA_V2:
        levels = _read(descriptor, page.offset, end)
    else:
        if page.is_compressed:
            levels = body = _body(descriptor, chunk, page)
        else:
            levels = _read(descriptor, page.offset, min(page.size, _WINDOW))
        start, end = 4, 4 + int.from_bytes(levels[:4], "little")
        if end > page.full_size:
            raise ParquetError("a page ends inside its levels")
        if end > len(levels):
            levels = _read(descriptor, page.offset, end)
        levels = levels[:end]
    found = hybrid(levels, start, chunk.max_level.bit_length(), page.num_values)
    present = found == chunk.max_level
    return (None if present.all() else present), end, body


def _plain_values(
    descriptor: int, chunk: Chunk, page: Page, count: int, start: int, body: bytes | None
) -> Values:
    """Walk from length to length."""
    if count * 4 > page.full_size - start:
        raise ParquetError(f"a page of {page.full_size} bytes cannot hold {count} values")
    is_in_file = not page.is_compressed
    if is_in_file and count and page.size // count >= _SPARSE:
        return _walk_file(descriptor, page.offset + start, page.offset + page.size, count)
    body = _body(descriptor, chunk, page) if body is None else body
    offsets, sizes = [0] * count, [0] * count
    position, unpack = start, struct.Struct("<I").unpack_from
    for number in range(count):
        (size,) = unpack(body, position)
        offsets[number], sizes[number] = position + 4, size
        position += 4 + size
        if position > len(body):
            raise ParquetError("a value reaches beyond its page")
    found = Values(body, np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64))
    if chunk.codec != "snappy" or not count or page.full_size // count < _SPARSE:
        return found
    return _packed_values(descriptor, page, found) or found


def _packed_values(descriptor: int, page: Page, found: Values) -> Values | None:
    """Leave a page of snappy packed, and read values from its fragments, if it has some."""
    begin, levels = page.offset + page.levels_size, page.levels_size
    if not page.is_compressed:
        return None
    stored = _read(descriptor, begin, page.size - levels)
    fragments = find_fragments(stored, begin, page.full_size - levels)
    if fragments is None:
        return None
    return Values(None, found.offsets - levels, found.sizes, fragments)


def _walk_file(descriptor: int, position: int, end: int, count: int) -> Values:
    offsets, sizes = [0] * count, [0] * count
    for number in range(count):
        size = int.from_bytes(_read(descriptor, position, 4), "little")
        offsets[number], sizes[number] = position + 4, size
        position += 4 + size
        if position > end:
            raise ParquetError("a value reaches beyond its page")
    return Values(None, np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64))


def _body(descriptor: int, chunk: Chunk, page: Page) -> bytes:
    """Return the body of a page, decompressed, with the levels of version 2 in front."""
    stored = _read(descriptor, page.offset, page.size)
    if not page.is_compressed:
        return stored
    levels, rest = stored[: page.levels_size], stored[page.levels_size :]
    size = page.full_size - page.levels_size
    if not size:
        return levels
    from pyarrow import Codec

    try:
        body = Codec(chunk.codec).decompress(rest, size, asbytes=True)
    except (OSError, ValueError) as error:
        raise ParquetError(f"a page cannot be decompressed: {one_line(error)}") from None
    if len(body) != size:
        raise ParquetError("a page holds fewer bytes than it says")
    return levels + body if levels else body


def hybrid(data: bytes, position: int, width: int, count: int) -> NDArray[np.int64]:
    """Decode Parquet's mixture of runs and packed bits.

    Args:
        data: bytes.
        position: of the first.
        width: bits of a number.
        count: numbers.

    Returns:
        (count,) int64.

    Raises:
        ParquetError: if there are fewer.

    Example:
        >>> hybrid(bytes([0b1000, 1, 0b11, 0b101]), 0, 1, 8).tolist()
        [1, 1, 1, 1, 1, 0, 1, 0]
    """
    if width > 32:
        raise ParquetError(f"numbers of {width} bits")
    out = np.zeros(count, dtype=np.int64)
    done, num_bytes = 0, (width + 7) // 8
    while done < count and width:
        try:
            header, position = _varint(data, position)
        except IndexError:
            raise ParquetError(f"{done} of {count} numbers are there") from None
        if header & 1:
            stop = min(count, done + 8 * (header >> 1))
            for first in range(done, stop, _UNPACKED):
                last = min(stop, first + _UNPACKED)
                begin = position + (first - done) // 8 * width
                packed = np.frombuffer(data[begin : begin + -(-(last - first) // 8) * width], "u1")
                bits = np.unpackbits(packed, bitorder="little")
                if len(bits) < (last - first) * width:
                    raise ParquetError("packed numbers are cut short")
                rows = bits[: (last - first) * width].reshape(-1, width)
                out[first:last] = rows @ (1 << np.arange(width, dtype=np.int64))
            position += (header >> 1) * width
        else:
            stop = min(count, done + (header >> 1))
            value = data[position : position + num_bytes]
            if len(value) < num_bytes:
                raise ParquetError("a run of numbers is cut short")
            out[done:stop] = int.from_bytes(value, "little")
            position += num_bytes
        done = stop
    return out


def _read_header(descriptor: int, position: int, end: int) -> tuple[dict[int, Any], int]:
    """Read the header of a page, and say how many bytes it has."""
    for window in (_WINDOW, _LARGEST_HEADER):
        data = os.pread(descriptor, min(window, end - position), position)
        try:
            return _struct(data, 0, 0)
        except IndexError:
            continue
    raise ParquetError("a page header is cut short")


def _struct(data: bytes, position: int, depth: int) -> tuple[dict[int, Any], int]:
    """Parse a struct of the compact protocol: values by field id, and where it ends."""
    if depth > _DEEPEST:
        raise ParquetError("a page header is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = data[position]
        position += 1
        if head == 0:
            return fields, position
        kind = head & 15
        if head >> 4:
            number += head >> 4
        else:
            number, position = _zigzag(data, position)
        if kind in (1, 2):  # the value of a bool is its type
            fields[number] = kind == 1
        else:
            fields[number], position = _value(data, position, kind, depth)


def _value(data: bytes, position: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):
        return _zigzag(data, position)
    if kind == 8:  # bytes, which nobody looks at
        size, position = _varint(data, position)
        data[position + size - 1 if size else position - 1]  # there
        return None, position + size
    if kind == 12:
        return _struct(data, position, depth + 1)
    if kind == 3:
        return data[position], position + 1
    if kind == 7:
        return None, position + 8
    raise ParquetError(f"a page header holds type {kind}")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        if position >= len(data):
            raise IndexError
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ParquetError("a number has too many bytes")


def _zigzag(data: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _read(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) < size:
        raise ParquetError(f"shard ends {size - len(data)} bytes early")
    return data
