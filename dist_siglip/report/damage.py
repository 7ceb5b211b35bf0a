"""Bounded reading of files that may be damaged: numbers, lines, arrays and names.

A record may have been cut, changed by a disk, written by hand, or made to do harm. Unusable entries
are left out and counted by the caller; nothing here fails in another way than it says.
"""

import errno
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_siglip.system.regular_file import open_regular

MOST_STEPS = 2**53
MOST_WIDTH = 8192  # of features: their spectra take the cube of it
_MOST_VALUE = 1e100  # sums of such numbers, and of their squares, are still finite
_MOST_LINE = 2**20
_MOST_ARRAY_BYTES = 2**34
_MOST_LETTERS = 200


def number_of(value: object) -> float | None:
    """Return a number of a JSON file, "nan" and "inf" included; None for anything else.

    Example:
        >>> number_of(3), number_of("inf"), number_of(10**400), number_of(True), number_of("x")
        (3.0, inf, None, None, None)
    """
    if value in ("nan", "inf", "-inf"):
        return float(str(value))
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return float(value) if abs(value) <= _MOST_VALUE else None


def step_of(value: object) -> int | None:
    """Return a number of optimizer steps; None for what cannot be one.

    Example:
        >>> step_of(3), step_of(3.0), step_of(-1), step_of(math.inf), step_of(10**400)
        (3, 3, None, None, None)
    """
    number = number_of(value)
    if number is None or not 0 <= number <= MOST_STEPS or number != int(number):
        return None
    return int(number)


def objects_of(path: Path) -> Iterator[dict[str, Any] | None]:
    """Go through the JSON objects of a file, one a line; None for a line that holds none.

    Raises:
        OSError: if it cannot be opened, or is no regular file.
    """
    with open_regular(path) as file:
        while line := file.readline(_MOST_LINE):
            is_whole = len(line) < _MOST_LINE
            while not line.endswith(b"\n") and (rest := file.readline(_MOST_LINE)):
                line = rest[-1:]
            try:
                found = json.loads(line.decode("utf-8", "replace")) if is_whole else None
            except (ValueError, RecursionError):
                found = None
            yield found if isinstance(found, dict) else None


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file; nothing in it is executed.

    Raises:
        OSError: if it cannot be opened, is no regular file, or is damaged.
    """
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:
                _refuse_more_than_can_be(archive)
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except OSError:
        raise
    except Exception as error:  # a damaged archive fails in as many ways as it has fields
        raise OSError(f"it is damaged ({type(error).__name__}: {printable(str(error))})") from error


def _refuse_more_than_can_be(archive: zipfile.ZipFile) -> None:
    """Refuse an archive that would be unpacked to more than any evaluation holds."""
    size = sum(entry.file_size for entry in archive.infolist())
    if size > _MOST_ARRAY_BYTES:
        raise OSError(errno.EFBIG, f"it says that it holds {size:,} bytes")


def printable(text: str) -> str:
    """Make a name or a message one line that every page, font and terminal can show.

    Example:
        >>> printable("a" + chr(10) + chr(0x1b) + chr(0xd800) + "<b>")
        'a���<b>'
    """
    shown = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    return shown if len(shown) <= _MOST_LETTERS else f"{shown[:_MOST_LETTERS]} ..."
