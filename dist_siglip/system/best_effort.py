"""Writes that training can do without: a failure is a warning, and the run goes on.

A file of lines never holds a part of one.
"""

import fcntl
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_siglip.system.process_lock import MovedError, check_place
from dist_siglip.system.regular_file import open_to_append

logger = logging.getLogger(__name__)

_MOST_WAITING = 10_000
_WAIT_SECONDS = 1.0  # for a file that another process is appending to


class LineLog:
    """Appends whole lines to a file, and outlives a disk that is full, gone or closed.

    Lines there is no room for wait in memory and are written ahead of the next one that fits, so
    that a file has no gap unless more than 10,000 waited; then the oldest are lost. Several
    processes may append to one file.

    Args:
        path: the file; its folder must exist when a line is written.
        name: what the lines are, for the warning.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._waiting: deque[str] = deque(maxlen=_MOST_WAITING)
        self._is_failing = False
        self._process = os.getpid()

    @property
    def num_waiting(self) -> int:
        """Lines that there was no room for yet."""
        return len(self._waiting)

    def append(self, line: str) -> None:
        """Append one line, given without its end, and those that waited for room."""
        if self._process != os.getpid():
            # In a forked process: what waits is the parent's, which will write it.
            self._waiting.clear()
            self._process = os.getpid()
        self._waiting.append(line)
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait, if there is room now."""
        if not self._waiting:
            return
        count = len(self._waiting)
        lines = "".join(f"{line}\n" for line in self._waiting)
        try:
            append_whole(self.path, lines.encode(errors="backslashreplace"))
        except MovedError:
            return  # the run ends for it, and says so
        except OSError as error:
            # Remembered before it is told: the warning may come back as a line of this log.
            was_failing, self._is_failing = self._is_failing, True
            if not was_failing:
                logger.warning(
                    "%s cannot be written to %s (%s): the run goes on, and lines wait for room",
                    self.name,
                    self.path,
                    error.strerror or error,
                )
            return
        self._waiting.clear()
        was_failing, self._is_failing = self._is_failing, False
        if was_failing:
            logger.warning("%s can be written again: %d lines waited for it", self.name, count)


def append_whole(path: Path, lines: bytes) -> None:
    """Append lines to a file, all of them or none.

    One write, so that lines of several processes do not mix on a local file system. What a full
    disk took of them is cut off again, unless another process has appended meanwhile. A part of a
    line that a crash has left at the end gets an end of its own. Processes take turns, since a
    line that another one is just writing looks like such a part; the wait is bounded, and where
    files have no locks there is none.

    Raises:
        OSError: if they cannot be written.
    """
    check_place(path)
    with open_to_append(path) as file:
        _take_turn(file.fileno())
        start = file.seek(0, os.SEEK_END)
        if start and os.pread(file.fileno(), 1, start - 1) != b"\n":
            lines = b"\n" + lines
        written = 0
        try:
            while written < len(lines):
                written += file.write(lines[written:])
        except OSError:
            if os.fstat(file.fileno()).st_size == start + written:
                with suppress(OSError):
                    file.truncate(start)
            raise


def _take_turn(descriptor: int) -> None:
    """Lock a file for this process until it is closed, where that works and does not take long."""
    latest = time.monotonic() + _WAIT_SECONDS
    with suppress(OSError):
        while time.monotonic() < latest:
            with suppress(BlockingIOError):
                # Locks of this kind are not inherited: a worker forked meanwhile cannot keep one.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.001)


@contextmanager
def best_effort(what: str, *consequences: type[Exception]) -> Iterator[None]:
    """Turn a failure to write inside the block into a warning.

    Example:
        >>> with best_effort("the report"):
        ...     raise OSError(28, "No space left on device")
    """
    told: tuple[type[Exception], ...] = (OSError, *consequences)
    try:
        yield
    except told as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning("%s cannot be written (%s); the run goes on without", what, reason)
