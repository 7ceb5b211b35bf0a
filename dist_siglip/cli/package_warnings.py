"""Keep warnings that other packages write for programmers from those who use the command line.

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
from typing import TextIO

logger = logging.getLogger(__name__)

# What a user should hear: the run will not do what was asked, or not where.
_MATTERS = re.compile(
    r"CUDA initialization|initialize NVML|cuda capability|GPU available but not used"
    r"|AMP with fp16 is not supported|`deterministic=True` and `benchmark=True`"
    r"|DataLoader will create \d+ worker processes",
    re.IGNORECASE,
)
_OURS = Path(__file__).parents[1]


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
