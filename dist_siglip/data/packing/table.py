"""Which pictures and captions does a table, or a folder, name?

A CSV, TSV, JSONL or Parquet file has one row for each picture; a folder has one picture for each
row, and the caption in a ``.txt`` of the same name. Rows come one by one, in file order, so a table
larger than memory is no trouble. A row that cannot be used says why instead of ending the reading.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dist_siglip.errors import UserError
from dist_siglip.regular_file import check_regular, open_regular, open_text

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")
PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_LONGEST_FIELD = 1 << 26  # characters of a CSV field; the csv module stops at 131,072 by itself
_BATCH_ROWS = 1024


class Columns(NamedTuple):
    """The columns of a table that matter.

    Attributes:
        image: holds the path of the picture.
        captions: hold a caption, or a list of captions, each.
        keep_others: whether the other columns are wanted too.
    """

    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    keep_others: bool = False


class Row(NamedTuple):
    """One row: a picture and its captions.

    Attributes:
        number: place in the table, from 0.
        picture: path as it stands there.
        captions: texts; empty if ``caption_path`` has it.
        others: the other columns, if they are wanted.
        caption_path: file with the caption, for folders.
        problem: why the row cannot be used; None if it can.
    """

    number: int
    picture: str = ""
    captions: tuple[str, ...] = ()
    others: Mapping[str, Any] = {}
    caption_path: str | None = None
    problem: str | None = None


def read_rows(table: Path, columns: Columns) -> Iterator[Row]:
    """Read the rows of a table, or of a folder of pictures with captions beside them.

    Args:
        table: .csv, .tsv (both UTF-8 with a line of names), .jsonl, .ndjson, .parquet, .pq; or a
            folder, taken in the order of relative paths.
        columns: which columns hold what; a folder has none.

    Raises:
        UserError: if the table is missing, of another kind or broken, or lacks a column.
    """
    suffix = table.suffix.lower()
    if table.is_dir():
        return _read_folder(table)
    if not table.is_file():
        raise UserError(f"table ({table}) does not exist; give a file or a folder of pictures")
    if suffix in _DELIMITERS:
        return _interpret(_read_csv(table, _DELIMITERS[suffix]), table, columns)
    if suffix in _JSON_LINES:
        return _interpret(_read_json_lines(table), table, columns)
    if suffix in _PARQUET:
        return _interpret(_read_parquet(table, columns), table, columns)
    known = ", ".join((*_DELIMITERS, *_JSON_LINES, *_PARQUET))
    raise UserError(f"table ({table}) must be a folder or one of {known}")


def digest_table(table: Path) -> str:
    """Hash the bytes of a table; of a folder, the paths, sizes and times of its pictures.

    Raises:
        UserError: if it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        if table.is_dir():
            for row in _read_folder(table):
                for name in (row.picture, str(row.caption_path)):
                    digest.update(os.fsencode(name) + _describe(table / name))
        else:
            with open_regular(table) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise UserError(f"table ({table}) cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _describe(path: Path) -> bytes:
    """Size and time of a file as bytes; nothing if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return b"\0"
    return f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode()


def _read_folder(folder: Path) -> Iterator[Row]:
    """Name every picture under a folder and its caption: ``.txt``, or else ``.json``."""
    found: list[tuple[str, str]] = []
    for parent, _, names in os.walk(folder, onerror=_refuse):
        present = set(names)
        for name in names:
            stem, extension = os.path.splitext(name)
            if extension[1:].lower() not in PICTURE_EXTENSIONS or name.startswith("."):
                continue
            has_only_json = f"{stem}.json" in present and f"{stem}.txt" not in present
            caption = f"{stem}.json" if has_only_json else f"{stem}.txt"
            place = os.path.relpath(parent, folder)
            found.append(
                (
                    os.path.normpath(os.path.join(place, name)),
                    os.path.normpath(os.path.join(place, caption)),
                )
            )
    for number, (picture, caption) in enumerate(sorted(found)):
        yield Row(number, picture, caption_path=caption)


def _refuse(error: OSError) -> None:
    """Stop at a folder that cannot be listed, rather than leave it out."""
    raise error


def _interpret(
    raw: Iterable[Mapping[str, Any] | str], table: Path, columns: Columns
) -> Iterator[Row]:
    """Pick the columns of raw rows; a text in place of a row says why there is none."""
    needed = (columns.image, *columns.captions)
    for number, values in enumerate(raw):
        if isinstance(values, str):
            yield Row(number, problem=values)
            continue
        missing = [name for name in needed if name not in values]
        if missing and number == 0:
            raise UserError(
                f"table ({table}) has no column {missing[0]!r}; it has "
                f"{', '.join(map(str, list(values)[:20]))}: set image_column and caption_column"
            )
        yield _row(number, values, columns, missing)


def _row(number: int, values: Mapping[str, Any], columns: Columns, missing: list[str]) -> Row:
    picture = values.get(columns.image)
    shown = picture if isinstance(picture, str) else ""
    if missing:
        return Row(number, shown, problem=f"column {missing[0]!r} is missing")
    if not shown or "\0" in shown:
        return Row(number, problem=f"column {columns.image!r} holds no path")
    captions: list[str] = []
    for name in columns.captions:
        value = values[name]
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                return Row(number, shown, problem=f"column {name!r} holds {kind}, not text")
            if text and text.strip():
                captions.append(text)
    if not captions:
        return Row(number, shown, problem="caption is empty")
    others = {}
    if columns.keep_others:
        needed = (columns.image, *columns.captions)
        others = {name: value for name, value in values.items() if name not in needed}
    return Row(number, shown, tuple(captions), others)


def _read_csv(table: Path, delimiter: str) -> Iterator[Mapping[str, Any] | str]:
    """Read rows of text; bytes that are not UTF-8 survive as surrogates and are found later."""
    csv.field_size_limit(_LONGEST_FIELD)
    with open_text(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise UserError(f"table ({table}) names a column twice in its first line")
            for fields in reader:
                if len(fields) == len(names):
                    yield dict(zip(names, fields, strict=True))
                elif fields:  # an empty line is no row
                    yield f"row has {len(fields)} fields, the first line {len(names)}"
        except csv.Error as error:
            raise UserError(
                f"table ({table}) is broken at line {reader.line_num}: {error}"
            ) from error


def _read_json_lines(table: Path) -> Iterator[Mapping[str, Any] | str]:
    with open_regular(table) as file:
        for line in file:
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                yield f"row is not JSON: {error}"
                continue
            yield values if isinstance(values, dict) else "row is not a JSON object"


def _read_parquet(table: Path, columns: Columns) -> Iterator[Mapping[str, Any] | str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            'Parquet needs pyarrow; pip install "dist-siglip[pack]", or write the table as CSV'
        ) from error
    try:
        check_regular(table)
        with parquet.ParquetFile(table) as file:
            names = file.schema_arrow.names
            if not columns.keep_others:
                needed = {columns.image, *columns.captions}
                names = [name for name in names if name in needed] or names
            for batch in file.iter_batches(_BATCH_ROWS, columns=names):
                for place in range(batch.num_rows):
                    yield _parquet_row(batch.slice(place, 1))
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # names that are not UTF-8
        reason = " ".join(str(error).split())
        raise UserError(f"table ({table}) is no readable Parquet file: {reason}") from error


def _parquet_row(batch: Any) -> Mapping[str, Any] | str:
    """Return the only row of a batch as plain values."""
    try:
        values: Mapping[str, Any] = batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"row is not UTF-8: {error.reason}"
    return values
