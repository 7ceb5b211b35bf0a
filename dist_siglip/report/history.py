"""Bounded reading of files that may be damaged; kept evaluations and incidents of a run.

A record may have been cut, changed by a disk, written by hand, or made to do harm. Unusable entries
are left out and counted by the caller; nothing here fails in another way than it says. Files of
lines may be long: they are read line by line, and reasons are counted.
"""

import errno
import json
import logging
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_siglip.data.remote.locations import redact
from dist_siglip.runs import RunFolder
from dist_siglip.system.regular_file import open_regular

MOST_STEPS = 2**53
MOST_WIDTH = 8192  # of features: their spectra take the cube of it
_MOST_VALUE = 1e100  # sums of such numbers, and of their squares, are still finite
_MOST_LINE = 2**20
_MOST_ARRAY_BYTES = 2**34
_MOST_PRINTED = 200
logger = logging.getLogger(__name__)
_MOST_EXAMPLES = 5
_MOST_LETTERS = 120
_NUMBER = re.compile(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?")
_MOST_READ = 64
_FEATURES = ("image_features", "text_features")
_HISTOGRAMS = ("positive_histogram", "negative_histogram")


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
    return shown if len(shown) <= _MOST_PRINTED else f"{shown[:_MOST_LETTERS]} ..."


@dataclass(frozen=True)
class Reasons:
    """Incidents of one kind.

    Attributes:
        counts: how often, by reason; numbers in a reason are replaced by "#", so that "12 bytes"
            and "13 bytes" are one.
        examples: the first few, as they are.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, example: str) -> None:
        """Count one."""
        self.counts[_NUMBER.sub("#", reason[:_MOST_LETTERS])] += 1
        if len(self.examples) < _MOST_EXAMPLES:
            self.examples.append(example)

    @property
    def total(self) -> int:
        """All of them."""
        return self.counts.total()


@dataclass(frozen=True)
class Incidents:
    """What went wrong.

    Attributes:
        bad_samples: by reason; a sample that is met twice counts twice.
        skipped_steps: by reason.
    """

    bad_samples: Reasons
    skipped_steps: Reasons


def read_incidents(folder: RunFolder, notes: list[str]) -> Incidents:
    """Read both files; a missing one means that nothing went wrong."""
    bad, skipped = Reasons(), Reasons()
    for line in _lines(folder.bad_samples, notes):
        reason = printable(str(line.get("reason", "no reason given")))
        place = printable(redact(f"{line.get('shard')}/{line.get('key')}"))
        bad.add(reason, f"{place}: {reason[:_MOST_LETTERS]}")
    for line in _lines(folder.skipped_steps, notes):
        reason = printable(str(line.get("reason", "no reason given")))
        skipped.add(reason, printable(f"step {line.get('step')}: {reason}"))
    return Incidents(bad, skipped)


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    damaged = 0
    try:
        for line in objects_of(path):
            if line is None:
                damaged += 1
            else:
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror or error}).")
    if damaged:
        notes.append(f"{path.name} has {damaged} unreadable line(s), which are left out.")


@dataclass(frozen=True)
class KeptEvaluation:
    """A part of one evaluation.

    Attributes:
        step: optimizer steps behind the weights.
        image_features: (n, D) float64, rows of length 1.
        text_features: (n, D) float64; row i belongs to image i.
        histogram_edges: (K + 1,), of cosines.
        positive_histogram: (K,) counts of all pairs with equal captions.
        negative_histogram: (K,) of all others.
    """

    step: int
    image_features: np.ndarray
    text_features: np.ndarray
    histogram_edges: np.ndarray
    positive_histogram: np.ndarray
    negative_histogram: np.ndarray


def read_history(folder: RunFolder, notes: list[str]) -> list[KeptEvaluation]:
    """Read all that can be used, earliest first; the rest is named in ``notes``."""
    found = []
    for step, path in list(folder.kept_evaluations().items())[-_MOST_READ:]:
        kept = _read(step, path)
        if kept is None:
            notes.append(f"evaluation/history/{path.name} cannot be used.")
        else:
            found.append(kept)
    widths = {kept.image_features.shape[1] for kept in found}
    if len(widths) > 1:
        notes.append("evaluation/history holds features of different widths, and is left out.")
        return []
    return found


def _read(step: int, path: Path) -> KeptEvaluation | None:
    try:
        found = arrays_of(path)
        arrays = {n: found[n] for n in (*_FEATURES, "histogram_edges", *_HISTOGRAMS)}
    except (OSError, KeyError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None
    if any(a.dtype.kind not in "fiu" or not np.isfinite(a).all() for a in arrays.values()):
        return None
    images, texts = (arrays[name].astype(np.float64) for name in _FEATURES)
    edges, *counts = (arrays[name] for name in ("histogram_edges", *_HISTOGRAMS))
    is_sound = (
        images.ndim == 2
        and images.shape == texts.shape
        and images.size > 0
        and images.shape[1] <= MOST_WIDTH
        and edges.ndim == 1
        and all(bins.shape == (len(edges) - 1,) for bins in counts)
    )
    if not is_sound:
        return None
    return KeptEvaluation(step, _unit(images), _unit(texts), edges, *counts)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Undo the rounding of the file."""
    lengths: np.ndarray = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: np.ndarray = rows / np.maximum(lengths, 1e-6)
    return unit
