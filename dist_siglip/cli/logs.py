"""Logging, one plain line a message on stderr and in the run's log, and other packages' warnings.

A package warns whoever calls it, us, of names it will drop; a user can do nothing about that.
Warnings of a user's own files (a stage, a loss, a callback) are shown as ever. With ``-W`` or
``PYTHONWARNINGS`` Python's rules hold and nothing is changed.
"""

import logging
import os
import re
import site
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dist_siglip.system.best_effort import LineLog
from dist_siglip.system.redaction import redact

logger = logging.getLogger(__name__)

# What a user should hear: the run will not do what was asked, or not where.
_MATTERS = re.compile(
    r"CUDA initialization|initialize NVML|cuda capability|GPU available but not used"
    r"|AMP with fp16 is not supported|`deterministic=True` and `benchmark=True`"
    r"|DataLoader will create \d+ worker processes",
    re.IGNORECASE,
)
_OURS = Path(__file__).parents[1]
_FORMAT = "%(asctime)s %(levelname).1s %(message)s"
_LIBRARIES = ("lightning.pytorch", "lightning.fabric", "torch.distributed", "open_clip")


@contextmanager
def packages_kept_quiet() -> Iterator[None]:
    """Hide warnings of installed packages in this process and in those it starts.

    A forked process inherits the hook. A spawned one, which would not, starts with ``-W ignore``:
    ``multiprocessing`` passes ``sys.warnoptions`` on. Ranks that Lightning or torchrun starts
    come through the command line themselves.
    """
    if sys.warnoptions:
        yield
        return
    folders = _folders_of_packages()
    show = warnings.showwarning

    def _show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not filename.startswith(folders):
            show(message, category, filename, lineno, file, line)
        elif _MATTERS.search(str(message)):
            logger.warning("%s", " ".join(str(message).split()))

    sys.warnoptions.append("ignore")
    warnings.showwarning = _show
    try:
        yield
    finally:
        warnings.showwarning = show
        sys.warnoptions.remove("ignore")


def _folders_of_packages() -> tuple[str, ...]:
    """Return the beginnings of the file names of installed code, Python's and ours."""
    paths = sysconfig.get_paths()
    found = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found |= {*site.getsitepackages(), site.getusersitepackages(), str(_OURS)}
    return (*(str(Path(folder)) + os.sep for folder in sorted(found)), "<frozen ")


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # not subscriptable before Python 3.11
    _StreamHandler = logging.StreamHandler


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
    from dist_siglip.distributed import is_first_process  # heavy

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
