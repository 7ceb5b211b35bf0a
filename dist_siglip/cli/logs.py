"""Logging: one plain line a message, on stderr and in the run's log."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dist_siglip.distributed import is_first_process
from dist_siglip.system.best_effort import LineLog
from dist_siglip.system.redaction import redact

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # not subscriptable before Python 3.11
    _StreamHandler = logging.StreamHandler

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"
_LIBRARIES = ("lightning.pytorch", "lightning.fabric", "torch.distributed", "open_clip")


class _Screen(_StreamHandler):
    """Writes to what ``sys.stderr`` is at the moment: a progress bar puts itself in between."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # the base class has an attribute
        return sys.stderr


class _Redacted(logging.Formatter):
    """Cuts the secrets of URLs out of every line, those of tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return redact(super().format(record))


class _InFile(logging.Handler):
    """Writes to a file; a full disk costs no line, unless it stays full to the end."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.lines = LineLog(path, "the log")

    def emit(self, record: logging.LogRecord) -> None:
        """Append a message."""
        self.lines.append(self.format(record))

    def flush(self) -> None:
        """Write what waits for room."""
        self.lines.flush()


def set_up_logging(log_file: Path | None = None) -> None:
    """Send our messages to stderr (and to ``log_file``), on rank 0; others only warn.

    Adverts and greetings of the libraries below are left out; their warnings stay.

    Args:
        log_file: appended to; None adds no file.
    """
    ours = logging.getLogger("dist_siglip")
    ours.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    ours.propagate = False
    if not ours.handlers:
        on_screen = _Screen()
        on_screen.addFilter(lambda record: not getattr(record, "is_on_bar", False))
        _add(ours, on_screen)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        _add(ours, _InFile(log_file))
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)


def _add(target: logging.Logger, handler: logging.Handler) -> None:
    handler.setFormatter(_Redacted(_FORMAT, datefmt="%H:%M:%S"))
    target.addHandler(handler)
