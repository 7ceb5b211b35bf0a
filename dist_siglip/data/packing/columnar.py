"""Rows of Parquet and Arrow files, one or all of a folder, as the datasets library exports them.

They hold paths of pictures or the pictures themselves, as plain bytes or, as data sets of the
Hugging Face hub do, as ``{bytes, path}``. Few rows are in memory at a time, and no more of a file
than one row group or batch; row groups that were packed before are passed over unread.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_siglip.data.parquet import one_line
from dist_siglip.data.parquet.footer import packages
from dist_siglip.data.parquet.rows import in_microseconds
from dist_siglip.data.remote.locations import PARQUET_ENDS
from dist_siglip.data.samples.picture_policy import EXTENSIONS_OF
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import check_regular

_LOGGER = logging.getLogger(__name__)
_BATCH_ROWS = 1024
_BATCH_PICTURES = 16  # rows, where they hold pictures
ARROW = (".arrow",)
PICTURE_ENDS = tuple(f".{each}" for found in EXTENSIONS_OF.values() for each in found)
_PART = re.compile(r"-\d+-of-\d+$")  # ends the name of a part, before its extension


def columnar_files(table: Path) -> list[Path]:
    """List the Parquet or Arrow files that are a table, in the order of their rows.

    Args:
        table: a file, a folder of files, or a pattern of their names. Other tables, and folders
            with pictures, have none.

    Raises:
        UserError: if a pattern has no file, or a folder holds several splits or both kinds.
    """
    if "*" in table.name and not table.exists():
        files = sorted(table.parent.glob(table.name))
        if not files:
            raise UserError(f"table ({table}) is the pattern of no file that is there")
        return _of_one_kind(files, table)
    if not table.is_dir():
        return (
            [table] if table.suffix.lower() in (*PARQUET_ENDS, *ARROW) and table.is_file() else []
        )
    if (table / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in table.iterdir() if each.is_dir())
        raise UserError(
            f"table ({table}) holds the splits {', '.join(splits)}; pack each into a folder of its "
            f"own, such as {table / splits[0] if splits else table}"
        )
    names = sorted(name for name in os.listdir(table) if not name.startswith("."))
    if any(name.lower().endswith(PICTURE_ENDS) for name in names):
        return []
    files = [table / name for name in names if name.lower().endswith((*PARQUET_ENDS, *ARROW))]
    splits = sorted({_PART.sub("", each.stem) for each in files if _PART.search(each.stem)})
    if len(splits) > 1:
        raise UserError(
            f"table ({table}) holds the splits {', '.join(splits)}; pack each into a folder of its "
            f"own, by a pattern in quotes: '{table / splits[0]}-*{files[0].suffix}'"
        )
    return _of_one_kind(files, table)


def _of_one_kind(files: list[Path], table: Path) -> list[Path]:
    kinds = sorted({each.suffix.lower() for each in files})
    if any(kind not in (*PARQUET_ENDS, *ARROW) for kind in kinds) or len(kinds) > 1:
        raise UserError(
            f"table ({table}) is of {', '.join(kinds)} files; it must be of one kind, "
            f"{' or '.join((*PARQUET_ENDS, *ARROW))}"
        )
    return files


def read_columnar(
    files: Sequence[Path], names: Sequence[str], *, keep_others: bool, first_row: int = 0
) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Read rows as plain values, with their numbers, over all files.

    Args:
        files: as ``columnar_files`` lists them.
        names: columns that are needed; those that are missing are missing in every row.
        keep_others: read the other columns, too, but for those that hold bytes.
        first_row: rows before this one are not wanted.

    Yields:
        Number and values of a row, or why there are none.

    Raises:
        UserError: if pyarrow is missing, or a file cannot be read.
    """
    number = 0
    for file in files:
        with _readable(file):
            wanted = _wanted(_schema(file), names, keep_others, is_told=file == files[0])
            for batch, num_rows in _batches(file, wanted, first_row - number):
                for place in range(0 if batch is None else num_rows):
                    if number + place >= first_row:
                        yield number + place, _row(batch.slice(place, 1))
                number += num_rows


def _batches(file: Path, wanted: list[str], num_unwanted: int) -> Iterator[tuple[Any, int]]:
    """Yield rows and how many they are; None in place of those that are unwanted."""
    pyarrow, parquet = packages()
    if file.suffix.lower() in ARROW:
        with pyarrow.OSFile(str(file)) as source:
            for batch in _open_arrow(pyarrow, source)[1]:
                num_unwanted -= batch.num_rows
                if num_unwanted >= 0:
                    yield None, batch.num_rows
                    continue
                chosen = batch.select(wanted)
                chosen.validate(full=True)  # a broken file may point anywhere
                yield chosen, batch.num_rows
        return
    with parquet.ParquetFile(file, pre_buffer=False) as opened:  # else it reads far ahead
        schema = opened.schema_arrow
        size = _BATCH_PICTURES if any(_holds_bytes(schema, n) for n in wanted) else _BATCH_ROWS
        for group in range(opened.metadata.num_row_groups):
            num_rows = opened.metadata.row_group(group).num_rows
            num_unwanted -= num_rows
            if num_unwanted >= 0:
                yield None, num_rows
                continue
            for batch in opened.iter_batches(size, row_groups=[group], columns=wanted):
                yield batch, batch.num_rows


def _open_arrow(pyarrow: Any, source: Any) -> tuple[Any, Iterator[Any]]:
    """Return schema and batches of a stream, as the datasets library writes, or of a file."""
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if not is_file:
        stream = pyarrow.ipc.open_stream(source)
        return stream.schema, iter(stream)
    file = pyarrow.ipc.open_file(source)
    return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))


def _schema(file: Path) -> Any:
    pyarrow, parquet = packages()
    if file.suffix.lower() not in ARROW:
        return parquet.read_schema(file)
    with pyarrow.OSFile(str(file)) as source:
        return _open_arrow(pyarrow, source)[0]


def _wanted(schema: Any, names: Sequence[str], keep_others: bool, *, is_told: bool) -> list[str]:
    """Name the columns to read."""
    wanted = [name for name in schema.names if name in names]
    if keep_others or len(wanted) < len(set(names)):  # the error will name what there is
        wanted = [n for n in schema.names if n in names or not _holds_bytes(schema, n)]
        if is_told and keep_others and (left_out := sorted(set(schema.names) - set(wanted))):
            _LOGGER.warning("columns that hold bytes are not kept: %s", ", ".join(left_out))
    return wanted


def hold_pictures(files: Sequence[Path], column: str) -> bool:
    """Tell whether a column of the first file holds bytes, alone or beside a path.

    Raises:
        UserError: as ``read_columnar``.
    """
    if not files:
        return False
    with _readable(files[0]):
        schema = _schema(files[0])
        return column in schema.names and _holds_bytes(schema, column)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Check that a path is that of a file; errors of its reader inside the block are a user's."""
    pyarrow, _ = packages()
    try:
        check_regular(file)
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # names that are not UTF-8
        reason = " ".join(str(error).split())
        kind = "Arrow" if file.suffix.lower() in ARROW else "Parquet"
        raise UserError(f"table ({file}) is no readable {kind} file: {reason}") from error


def _holds_bytes(schema: Any, name: str) -> bool:
    """Tell whether a column, or a field of it, is of bytes."""
    kind = schema.field(name).type
    kinds = [field.type for field in kind] if str(kind).startswith("struct") else [kind]
    return any("binary" in str(one) for one in kinds)


def _row(batch: Any) -> Mapping[str, Any] | str:
    """Return the only row of a batch as plain values, or why it has none."""
    pyarrow, _ = packages()
    try:
        for place, column in enumerate(batch.columns):
            if (cut := in_microseconds(column)) is not column:
                batch = batch.set_column(place, batch.schema.names[place], cut)
        values: Mapping[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"row is not UTF-8: {error.reason}"
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        return f"row cannot be read: {one_line(error)}"
    return values
