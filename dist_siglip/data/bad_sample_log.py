"""Where is every bad sample written down?

One JSON object a line, in a file that all loader processes of all ranks append to. Each line is one
write, so lines do not mix on a local file system; what cannot be written is told once and lost.
"""

import json
import logging
import os
from typing import Any

_REASON = 200  # characters of a reason in a list of names
_LOGGER = logging.getLogger(__name__)


class BadSampleLog:
    """Appends to a file of bad samples.

    Args:
        path: the file; its folder must exist. None writes nothing.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._has_complained = False

    def append(self, **record: Any) -> None:
        """Add one line; a full disk or a lost folder does not stop the run."""
        if self.path is None:
            return
        line = json.dumps(record, ensure_ascii=True) + "\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._has_complained:
                _LOGGER.warning("bad samples cannot be written to %s: %s", self.path, error)
            self._has_complained = True


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
        with open(path, encoding="utf-8") as file:
            file.seek(start_bytes)
            for line in file:
                record = json.loads(line)
                names.append(f"{record['shard']}/{record['key']}: {record['reason'][:_REASON]}")
                if len(names) == count:
                    break
    except (OSError, ValueError, KeyError, TypeError):
        return names
    return names
