"""The rows of a Parquet file, with paths of pictures or the pictures themselves.

Data sets of the Hugging Face hub hold a picture as ``{bytes, path}``, others as plain bytes. Few
rows are in memory at a time, and no more of the file than one row group; groups that were packed
before are passed over unread.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import check_regular

_LOGGER = logging.getLogger(__name__)
_BATCH_ROWS = 1024
_BATCH_PICTURES = 16  # rows, where they hold pictures


def read_parquet(
    table: Path, names: Sequence[str], *, keep_others: bool, first_row: int = 0
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Read rows as plain values, with their numbers.

    Args:
        table: the file.
        names: columns that are needed; those that are missing are missing in every row.
        keep_others: read the other columns, too, but for those that hold bytes.
        first_row: rows before this one are not wanted.

    Yields:
        Number and values of a row, or why there are none.

    Raises:
        UserError: if pyarrow is missing, or the file cannot be read.
    """
    pyarrow, parquet = _packages()
    try:
        check_regular(table)
        with parquet.ParquetFile(table, pre_buffer=False) as file:  # else it reads far ahead
            schema = file.schema_arrow
            wanted = [name for name in schema.names if name in names]
            if keep_others or not wanted:
                wanted = [n for n in schema.names if n in names or not _holds_bytes(schema, n)]
                if left_out := sorted(set(schema.names) - set(wanted)):
                    _LOGGER.warning("columns that hold bytes are not kept: %s", ", ".join(left_out))
            size = _BATCH_PICTURES if any(_holds_bytes(schema, n) for n in wanted) else _BATCH_ROWS
            number = 0
            for group in range(file.metadata.num_row_groups):
                end = number + file.metadata.row_group(group).num_rows
                if end <= first_row:
                    number = end
                    continue
                for batch in file.iter_batches(size, row_groups=[group], columns=wanted):
                    for place in range(batch.num_rows):
                        if number >= first_row:
                            yield number, _row(batch.slice(place, 1))
                        number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # names that are not UTF-8
        reason = " ".join(str(error).split())
        raise UserError(f"table ({table}) is no readable Parquet file: {reason}") from error


def holds_pictures(table: Path, column: str) -> bool:
    """Tell whether a column of a Parquet file holds bytes, alone or beside a path.

    Raises:
        UserError: as ``read_parquet``.
    """
    pyarrow, parquet = _packages()
    try:
        check_regular(table)
        with parquet.ParquetFile(table) as file:
            schema = file.schema_arrow
            return column in schema.names and _holds_bytes(schema, column)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"table ({table}) is no readable Parquet file: {reason}") from error


def _packages() -> tuple[Any, Any]:
    """Import pyarrow and its reader of Parquet."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            'Parquet needs pyarrow; pip install "dist-siglip[pack]", or write the table as CSV'
        ) from error
    return pyarrow, parquet


def _holds_bytes(schema: Any, name: str) -> bool:
    """Tell whether a column, or a field of it, is of bytes."""
    kind = schema.field(name).type
    kinds = [field.type for field in kind] if str(kind).startswith("struct") else [kind]
    return any("binary" in str(one) for one in kinds)


def _row(batch: Any) -> Mapping[str, Any] | str:
    """Return the only row of a batch as plain values."""
    try:
        values: Mapping[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"row is not UTF-8: {error.reason}"
    return values
