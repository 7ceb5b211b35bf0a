"""The footer of a Parquet file: which rows and columns it holds, and where.

It stands at the end and is the index of the file: nothing else is read to know its samples, but for
the levels of columns of which it says that values are missing. pyarrow parses it; what it claims is
compared with the file before it is used.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.parquet import ParquetError, one_line
from dist_siglip.data.parquet.pages import Chunk
from dist_siglip.errors import UserError

MAGIC = b"PAR1"
TAIL = 1 << 16  # bytes at the end of a file, which hold most footers
LARGEST_FOOTER = 1 << 28
_MOST_COLUMNS = 1 << 16
_CODECS = {"UNCOMPRESSED": "", "LZ4_RAW": "lz4_raw"}
_KNOWN = ("SNAPPY", "GZIP", "ZSTD", "BROTLI")
ODD_CODEC = "?"  # one that pyarrow alone reads
_TEXT = ("STRING", "JSON", "ENUM")
# Columns that stand for a member of a tar where none has its name, here and in tables of paths.
STAND_INS = {"txt": ("caption", "text", "title"), "cls": ("label",)}


def packages() -> tuple[Any, Any]:
    """Import pyarrow and its reader of Parquet.

    Raises:
        UserError: if it is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError('Parquet needs pyarrow; pip install "dist-siglip[parquet]"') from error
    return pyarrow, parquet


class Column(NamedTuple):
    """A column of the table: one leaf, or several of a struct or a list.

    Attributes:
        name: as in the file.
        leaves: numbers of its leaves.
        value: the leaf with the texts or bytes that can be read one by one; -1 for none.
        is_picture: whether that holds bytes which are no text.
        holds_bytes: whether any leaf does.
    """

    name: str
    leaves: tuple[int, ...]
    value: int
    is_picture: bool
    holds_bytes: bool


def read_footer(descriptor: int) -> bytes:
    """Return the bytes of a footer, without the length and the magic behind it.

    Raises:
        ParquetError: if there is none.
    """
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, min(size, TAIL), max(0, size - TAIL))
    length = footer_length(tail, size)
    if length + 8 > len(tail):
        tail = os.pread(descriptor, length + 8, size - length - 8)
    if len(tail) < length + 8:
        raise ParquetError("it became shorter")
    return tail[-length - 8 : -8]


def footer_length(tail: bytes, file_size: int) -> int:
    """Return how many bytes the footer has, from the last bytes of a file of a size.

    Raises:
        ParquetError: if they are not those of a Parquet file.
    """
    if not file_size:
        raise ParquetError("it is empty")
    if len(tail) < 8 or tail[-4:] != MAGIC:
        if tail.endswith(b"PARE"):
            raise ParquetError("it is encrypted")
        raise ParquetError("it does not end as a Parquet file does; it may be cut short")
    length = int.from_bytes(tail[-8:-4], "little")
    if length > min(LARGEST_FOOTER, file_size - 12):
        raise ParquetError(f"its footer has {length} bytes, of a file of {file_size}")
    return length


class ParquetFooter:
    """What a footer says, compared with the size of the file.

    Args:
        footer: bytes, as ``read_footer`` returns them.
        file_size: in bytes.

    Attributes:
        columns: of the table.
        starts: the first row of each row group; last, the number of rows.
        digest: hash of the footer, for telling changed data.
        metadata: as pyarrow has it.

    Raises:
        ParquetError: if it is damaged, or claims what the file cannot hold.
        UserError: if pyarrow is missing.
    """

    def __init__(self, footer: bytes, file_size: int) -> None:
        pyarrow, parquet = packages()
        length = len(footer).to_bytes(4, "little")
        try:
            source = pyarrow.BufferReader(MAGIC + footer + length + MAGIC)
            self.metadata = parquet.read_metadata(source)
            schema = self.metadata.schema.to_arrow_schema()
            groups = range(self.metadata.num_row_groups)
            counts = [self.metadata.row_group(group).num_rows for group in groups]
            self.columns = tuple(self._columns_of(schema))
        except ParquetError:
            raise
        except (
            pyarrow.ArrowException,
            OSError,
            ValueError,
            OverflowError,
            RecursionError,
        ) as error:
            raise ParquetError(f"its footer cannot be read: {one_line(error)}") from None
        behind = len(footer) - self.metadata.serialized_size
        if behind:  # pyarrow ends the process if it is asked for a column that is encrypted
            raise ParquetError(f"{behind} bytes sign its footer; encrypted columns are not read")
        if self.metadata.num_columns > _MOST_COLUMNS:
            raise ParquetError(f"it has {self.metadata.num_columns} columns")
        if any(count < 0 for count in counts) or sum(counts) > file_size:
            raise ParquetError(f"its footer claims {sum(counts)} rows in {file_size} bytes")
        self.file_size = file_size
        self._chunks: dict[tuple[int, int], Chunk] = {}
        self.starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        self.digest = hashlib.blake2b(footer, digest_size=16).hexdigest()

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return int(self.starts[-1])

    def group_of(self, row: int) -> int:
        """Return the row group of a row.

        Raises:
            ParquetError: if there is no such row.
        """
        if not 0 <= row < self.num_rows:
            raise ParquetError(f"row {row} of {self.num_rows}: the file changed")
        return bisect_right(self.starts, row) - 1

    def chunk(self, group: int, leaf: int) -> Chunk:
        """Return the column chunk of a leaf in a row group.

        Raises:
            ParquetError: if it lies outside of the file, or in another one.
        """
        known = self._chunks.get((group, leaf))
        if known is None:
            known = self._chunks[group, leaf] = self._chunk(group, leaf)
        return known

    def _chunk(self, group: int, leaf: int) -> Chunk:
        found = self.metadata.row_group(group).column(leaf)
        if found.file_path:
            raise ParquetError("a column lies in another file")
        offset = found.data_page_offset
        if found.dictionary_page_offset is not None:
            # Some writers say 0 where there is none.
            offset = min(offset, found.dictionary_page_offset or offset)
        size, num_values = found.total_compressed_size, found.num_values
        if not (4 <= offset <= offset + size <= self.file_size - 8 and num_values >= 0):
            raise ParquetError(f"a column of {size} bytes at byte {offset} is not in the file")
        name = found.compression
        codec = name.lower() if name in _KNOWN else _CODECS.get(name, ODD_CODEC)
        kind = self.metadata.schema.column(leaf)
        level, is_list = kind.max_definition_level, kind.max_repetition_level > 0
        return Chunk(offset, size, num_values, codec, level, is_list)

    def num_nulls(self, group: int, leaf: int) -> int:
        """Return how many values of a leaf the footer says are missing; 0 if it does not say."""
        found = self.metadata.row_group(group).column(leaf)
        has_count = found.is_stats_set and found.statistics.has_null_count
        return int(found.statistics.null_count) if has_count else 0

    def mean_sizes(self, column: Column) -> NDArray[np.int64]:
        """Return the stored bytes of a column by row: those of its row group, shared evenly."""
        means, counts = [], np.diff(self.starts)
        for group, count in enumerate(counts.tolist()):
            stored = self.metadata.row_group(group)
            total = sum(stored.column(leaf).total_compressed_size for leaf in column.leaves)
            means.append(min(max(0, total), self.file_size) // max(1, count))
        return np.repeat(np.array(means, dtype=np.int64), counts)

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Numbers of the columns by name in lower case; of equal ones the first."""
        found: dict[str, int] = {}
        for number, column in enumerate(self.columns):
            found.setdefault(column.name.lower(), number)
        return found

    def find(self, member: str) -> int | None:
        """Return the column that stands for a member of a tar; None for none."""
        for name in (member, *STAND_INS.get(member, ())):
            if name in self.by_name:
                return self.by_name[name]
        return None

    def picture_columns(self, members: Sequence[str]) -> list[int]:
        """List the columns with pictures, best first: those named, or else the only ones there are.

        Returns:
            None of them if several could be meant, and none is called "image".
        """
        named = [self.by_name[name] for name in members if name in self.by_name]
        named = [number for number in named if self.columns[number].value >= 0]
        if named:
            return named
        able = [number for number, column in enumerate(self.columns) if column.is_picture]
        called = [number for number in able if self.columns[number].name.lower() == "image"]
        return called or (able if len(able) == 1 else [])

    def _columns_of(self, schema: Any) -> list[Column]:
        """Assign the leaves, which run on from column to column."""
        found, first = [], 0
        for field in schema:
            count = _num_leaves(field.type)
            leaves = tuple(range(first, first + count))
            first += count
            found.append(self._column(field, leaves))
        if first != self.metadata.num_columns:
            raise ParquetError("its columns are not those of its schema")
        return found

    def _column(self, field: Any, leaves: tuple[int, ...]) -> Column:
        schema = self.metadata.schema
        kinds = [schema.column(leaf) for leaf in leaves]
        is_bytes = [
            kind.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
            and kind.logical_type.type == "NONE"
            for kind in kinds
        ]
        children = _children(field.type)
        value = -1
        if not children:
            value = leaves[0]
        elif str(field.type).startswith("struct"):
            for child, leaf in zip(children, leaves, strict=False):
                if _children(child.type):  # the leaves do not run on with the children any more
                    break
                if child.name == "bytes":
                    value = leaf
        if value >= 0:
            kind = schema.column(value)
            is_text = kind.logical_type.type in ("NONE", *_TEXT)
            if kind.physical_type != "BYTE_ARRAY" or kind.max_repetition_level or not is_text:
                value = -1
        return Column(
            field.name,
            leaves,
            value,
            value >= 0 and is_bytes[value - leaves[0]],
            any(is_bytes),
        )


def parse_footer(descriptor: int) -> ParquetFooter:
    """Read and check the footer of an open file; as ``ParquetFooter``."""
    return ParquetFooter(read_footer(descriptor), os.fstat(descriptor).st_size)


def _children(kind: Any) -> list[Any]:
    """List the fields of a type that has some."""
    kind = getattr(kind, "storage_type", kind)
    return [kind.field(number) for number in range(kind.num_fields)]


def _num_leaves(kind: Any) -> int:
    children = _children(kind)
    return sum(_num_leaves(child.type) for child in children) if children else 1
