"""Where is every bad sample written down?

One JSON object a line, in a file that all loader processes of all ranks append to; a full disk or a
lost folder does not stop the run (``full_disk``). Pictures that are used although their file ends
too early are counted in the log alone.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_siglip.system.best_effort import LineLog
from dist_siglip.system.regular_file import open_text

_LOGGER = logging.getLogger(__name__)
_NAMED = 20  # truncated pictures named by each process; then every hundredth
_REASON = 200  # characters of a reason in a list of names


class BadSampleLog:
    """Appends to a file of bad samples.

    Args:
        path: the file; its folder must exist. None writes nothing.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._lines = None if path is None else LineLog(Path(path), "bad samples")

    def append(self, **record: Any) -> None:
        """Add one line; where there is no room for it, it waits in this process."""
        if self._lines is not None:
            self._lines.append(json.dumps(record, ensure_ascii=True))


class TruncatedCount:
    """Counts truncated pictures that this process used, and names them in the log.

    Args:
        describe: name of a sample, by its id.
    """

    def __init__(self, describe: Callable[[int], str]) -> None:
        self._describe = describe
        self._count = 0

    def note(self, sample_id: int) -> None:
        """Count the picture of a sample."""
        self._count += 1
        if self._count <= _NAMED or self._count % 100 == 0:
            _LOGGER.warning(
                "truncated picture %d in this process: %s; what there is of it is used",
                self._count,
                self._describe(sample_id),
            )


def first_lines(path: str | None, count: int, start_bytes: int = 0) -> list[str]:
    """Name the first bad samples of a file, as ``shard/key: reason``.

    Args:
        path: the file; None has no lines.
        count: most lines.
        start_bytes: where to begin: what a file held before this start of a run is passed over.

    Returns:
        At most ``count`` names; none if there is no file.
    """
    names: list[str] = []
    if path is None:
        return names
    try:
        with open_text(path, errors="replace") as file:
            file.seek(start_bytes)
            for line in file:
                if name := _name_of(line):
                    names.append(name)
                if len(names) == count:
                    break
    except OSError:
        return names
    return names


def _name_of(line: str) -> str | None:
    """Name the sample of a line; None for one that a crash has cut."""
    try:
        record = json.loads(line)
        return f"{record['shard']}/{record['key']}: {record['reason'][:_REASON]}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
