"""Files that are either whole under their name or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under ``path`` only when it is complete and on disk.

    It is written beside its final name (so that the rename never crosses a file system), flushed,
    synced and renamed; then the folder is synced. On an error the previous file stays and nothing
    is left behind. The folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes in one piece; see ``open_atomically``."""
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
