"""Rows of a table, or of a folder: pictures and their captions.

A CSV, TSV or JSONL file, and Parquet or Arrow files, have one row for each picture; a folder has
one picture for each row, and the caption in a ``.txt`` of the same name. Rows come one by one, in
file order, so a table larger than memory is no trouble. A row that cannot be used says why instead
of ending the reading. What is wrong with a table as a whole is found before the first row is used.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dist_siglip.data.packing.columnar import (
    ARROW,
    PICTURE_ENDS,
    columnar_files,
    read_columnar,
)
from dist_siglip.data.remote.locations import PARQUET_ENDS
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import open_regular, open_text

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
PICTURE_COLUMNS = ("image", "picture", "file_name", "filepath", "path")  # of unpacked tables
_LONGEST_FIELD = 1 << 26  # characters of a CSV field; the csv module stops at 131,072 by itself
_MOST_CLASSES = 1 << 31


class Columns(NamedTuple):
    """The columns of a table that matter.

    Attributes:
        image: holds the path of the picture, or the picture: bytes, or ``{bytes, path}``.
        captions: hold a caption, or a list of captions, each; none if only classes are wanted.
        keep_others: whether the other columns are wanted too.
        label: holds the number of a class; None if there are no classes.
        pictures: extensions of the pictures of a folder.
    """

    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    keep_others: bool = False
    label: str | None = None
    pictures: tuple[str, ...] = PICTURE_EXTENSIONS

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that every row must have."""
        return (self.image, *self.captions, *([] if self.label is None else [self.label]))


class Row(NamedTuple):
    """One row: a picture and its captions.

    Attributes:
        number: place in the table, from 0.
        picture: path as it stands there.
        captions: texts; empty if ``caption_path`` has it.
        others: the other columns, if they are wanted.
        caption_path: file with the caption, for folders.
        problem: why the row cannot be used; None if it can.
        data: the picture itself, if it stands in the table.
        label: number of its class; None if it has none.
    """

    number: int
    picture: str = ""
    captions: tuple[str, ...] = ()
    others: Mapping[str, Any] = {}
    caption_path: str | None = None
    problem: str | None = None
    data: bytes | None = None
    label: int | None = None


def check_table(table: Path, columns: Columns) -> None:
    """Find what is wrong with a table as a whole; a CSV or TSV file is read to its end for that.

    Raises:
        UserError: if it is missing, of another kind, broken or empty, or lacks a column.
    """
    rows = read_rows(table, columns)
    if next(rows, None) is None:
        of = f"no picture ({', '.join(columns.pictures)}) and no Parquet or Arrow file"
        what = of if table.is_dir() and not columnar_files(table) else "no rows"
        raise UserError(f"table ({table}) has {what}; there is nothing to pack")
    if table.suffix.lower() in DELIMITERS:
        for _ in rows:  # a quote that is not closed shows at the end
            pass


def read_rows(table: Path, columns: Columns, first_row: int = 0) -> Iterator[Row]:
    """Read the rows of a table, or of a folder of pictures with captions beside them.

    Args:
        table: .csv, .tsv (both UTF-8 with a line of names), .jsonl, .ndjson; .parquet, .pq or
            .arrow, a pattern of such names or the folder of such files; or a folder of pictures,
            taken in the order of relative paths.
        columns: which columns hold what; a folder has none.
        first_row: number of the row to begin at.

    Raises:
        UserError: if the table is missing, of another kind or broken, or lacks a column.
    """
    suffix = table.suffix.lower()
    if files := columnar_files(table):
        raw = read_columnar(
            files, columns.needed, keep_others=columns.keep_others, first_row=first_row
        )
        return _interpret(raw, table, columns)
    if table.is_dir():
        return islice(_read_folder(table, columns.pictures), first_row, None)
    if not table.is_file():
        raise UserError(f"table ({table}) does not exist; give a file or a folder of pictures")
    if suffix in DELIMITERS:
        lines = enumerate(read_csv(table, DELIMITERS[suffix], columns))
        return _interpret(islice(lines, first_row, None), table, columns)
    if suffix in JSON_LINES:
        return _interpret(
            islice(enumerate(read_json_lines(table)), first_row, None), table, columns
        )
    known = ", ".join((*DELIMITERS, *JSON_LINES, *PARQUET_ENDS, *ARROW))
    raise UserError(f"table ({table}) must be a folder or one of {known}")


def digest_table(table: Path, columns: Columns) -> str:
    """Hash the bytes of a table; of several files, their paths, sizes and times.

    Raises:
        UserError: if it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        files = columnar_files(table)
        if files and files != [table]:
            for part in files:
                digest.update(os.fsencode(part.name) + _describe(part))
        elif table.is_dir():
            for row in _read_folder(table, columns.pictures):
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


def _read_folder(folder: Path, extensions: Sequence[str]) -> Iterator[Row]:
    """Name every picture under a folder and its caption: ``.txt``, or else ``.json``."""
    found: list[tuple[str, str]] = []
    for parent, _, names in os.walk(folder, onerror=_refuse):
        present = set(names)
        for name in names:
            stem, extension = os.path.splitext(name)
            if extension[1:].lower() not in extensions or name.startswith("."):
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
    raw: Iterable[tuple[int, Mapping[str, Any] | str]], table: Path, columns: Columns
) -> Iterator[Row]:
    """Pick the columns of raw rows; a text in place of a row says why there is none."""
    is_first = True
    for number, values in raw:
        if isinstance(values, str):
            yield Row(number, problem=values)
            continue
        if is_first:
            _check_names(list(values), table, columns)
            is_first = False
        missing = [name for name in columns.needed if name not in values]
        yield _row(number, values, columns, missing)


def _check_names(names: Sequence[str], table: Path, columns: Columns) -> None:
    """Refuse a table without the columns that are needed."""
    missing = [name for name in columns.needed if name not in names]
    if not missing:
        return
    hint = "set image_column and caption_column"
    if columns.label is not None:
        hint += " (null for none) and class_column"
    separator = next((s for s in ";\t|," if s in str(names[0])), None) if len(names) == 1 else None
    if separator is not None:
        hint = (
            f"that is one column, and {separator!r} seems to separate more: write the table with "
            "',' as .csv, or with tabs as .tsv"
        )
    raise UserError(
        f"table ({table}) has no column {missing[0]!r}; it has {', '.join(map(str, names[:20]))}: "
        f"{hint}"
    )


def _row(number: int, values: Mapping[str, Any], columns: Columns, missing: list[str]) -> Row:
    shown, data = _picture_of(values.get(columns.image))
    if missing:
        return Row(number, shown, problem=f"column {missing[0]!r} is missing")
    if data is None and (not shown or "\0" in shown):
        return Row(number, problem=f"column {columns.image!r} holds no path and no bytes")
    label = None
    if columns.label is not None:
        label = _class_of(values[columns.label])
        if label is None:
            problem = (
                f"column {columns.label!r} holds {values[columns.label]!r:.40}, not the number"
            )
            return Row(number, shown, problem=f"{problem} of a class, from 0")
    captions: list[str] = []
    for name in columns.captions:
        value = values[name]
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                return Row(number, shown, problem=f"column {name!r} holds {kind}, not text")
            if text and text.strip():
                captions.append(text)
    if columns.captions and not captions:
        return Row(number, shown, problem="caption is empty")
    others = {}
    if columns.keep_others:
        needed = columns.needed
        others = {name: value for name, value in values.items() if name not in needed}
    return Row(number, shown, tuple(captions), others, data=data, label=label)


def _picture_of(value: Any) -> tuple[str, bytes | None]:
    """Return the path, or a name, of a picture, and the picture if it is here."""
    if isinstance(value, Mapping):  # an image of the datasets library
        path, data = value.get("path"), value.get("bytes")
        return path if isinstance(path, str) else "", data if isinstance(data, bytes) else None
    if isinstance(value, bytes):
        return "", value
    return value if isinstance(value, str) else "", None


def _class_of(value: Any) -> int | None:
    """Return the number of a class; None for what is none."""
    if isinstance(value, str):
        value = int(value) if value.strip().isascii() and value.strip().isdigit() else None
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and 0 <= value < _MOST_CLASSES else None


def resolve(folder: str, path: str) -> tuple[str, bool]:
    """Follow every link of a path that counts from a folder, and say whether it ends in there.

    Raises:
        ValueError: if it can be no path: a NUL, or what no file name holds.
    """
    real = os.path.realpath(os.path.join(folder, path))
    return real, real.startswith(os.path.join(os.path.realpath(folder), ""))


def read_csv(
    table: Path, delimiter: str, columns: Columns | None = None
) -> Iterator[Mapping[str, Any] | str]:
    """Read rows of text; bytes that are not UTF-8 survive as surrogates and are found later.

    Args:
        table: with a line of names.
        delimiter: between fields.
        columns: that it needs; None for a picture under one of ``PICTURE_COLUMNS``, if any.

    Raises:
        UserError: if it is broken, or a column is missing.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with open_text(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Else a quote that is not closed would make one text of many rows.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        line = 1
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise UserError(f"table ({table}) names a column twice in its first line")
            if names and columns is not None:
                _check_names(names, table, columns)
            meant = PICTURE_COLUMNS if columns is None else (columns.image,)
            image = next((names.index(name) for name in meant if name in names), 0)
            line = reader.line_num + 1
            for fields in reader:
                if reader.line_num > line:
                    _refuse_swallowed_row(fields, image, delimiter, len(names))
                if len(fields) == len(names):
                    yield dict(zip(names, fields, strict=True))
                elif fields:  # an empty line is no row
                    yield f"row has {len(fields)} fields, the first line {len(names)}"
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"table ({table}) is broken in the row that begins at line {line}, read up to line "
                f"{reader.line_num}: {error}; is a quote there not closed? Quotes inside of a text "
                "in quotes are written twice"
            ) from error


def _refuse_swallowed_row(
    fields: Sequence[str], image: int, delimiter: str, num_columns: int
) -> None:
    """Refuse a text of several lines one of which names a picture as a row does."""
    for field in fields:
        for line in field.splitlines()[1:]:
            parts = line.split(delimiter)
            if len(parts) >= num_columns and parts[image].lower().endswith(PICTURE_ENDS):
                raise csv.Error("a text in quotes holds what looks like another row")


def read_json_lines(table: Path) -> Iterator[Mapping[str, Any] | str]:
    """Read objects, one a line; a text in place of one says why there is none."""
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
