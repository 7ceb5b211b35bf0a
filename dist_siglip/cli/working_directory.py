"""Class paths of files in the working directory, whatever way the program was started.

``python -m`` has the working directory on ``sys.path``, the ``dist-siglip`` command does not. So a
module that a command line or its files name is looked for there too, after everything installed:
no file in the directory can stand in for a package, and none is imported that was not named. Once
one is found, the directory stays at the end of ``sys.path``, for the processes of loaders.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_DOTTED = re.compile(r"\b([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)+")
_SUFFIXES = (".yaml", ".yml", ".json")
_LARGEST_FILE = 2**20


@contextmanager
def modules_of_working_directory(arguments: Sequence[str]) -> Iterator[None]:
    """Find modules that arguments name in the working directory, while the block runs.

    Args:
        arguments: the command line; YAML and JSON files among them are looked into.
    """
    finder = _Finder(_first_names(arguments), Path.cwd())
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """The last finder that is asked: for modules of a folder with one of these names."""

    def __init__(self, names: set[str], folder: Path) -> None:
        self._names, self._folder = names, str(folder)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where a top-level module lies; packages find their parts themselves."""
        if path is not None or name not in self._names:
            return None
        found = PathFinder.find_spec(name, [self._folder], target)
        if found is None or found.loader is None:  # a mere folder is no module
            return None
        if self._folder not in sys.path:
            sys.path.append(self._folder)
        return found


def _first_names(arguments: Sequence[str]) -> set[str]:
    """First parts of all dotted names in arguments and in the files they name."""
    texts = list(arguments)
    for argument in arguments:
        path = Path(argument.rpartition("=")[2])
        if path.suffix in _SUFFIXES and path.is_file() and path.stat().st_size <= _LARGEST_FILE:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return {found.group(1) for text in texts for found in _DOTTED.finditer(text)}
