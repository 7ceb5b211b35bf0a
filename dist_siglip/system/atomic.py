"""Files that are whole under their name or absent, and the user's cache folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from dist_siglip.system.process_lock import check_place


def user_cache_folder(name: str) -> str:
    """Name a folder of ours in the user's cache: ``XDG_CACHE_HOME``, else ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "dist_siglip", name)


@contextmanager
def open_atomically(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under ``path`` only when it is complete.

    It is written beside its final name (so that the rename never crosses a file system), synced
    and renamed; then the folder is synced. On an error the previous file stays and nothing is
    left behind. The folder is made if it is missing.

    Raises:
        MovedError: if it is in a folder that this process has claimed and that was moved away.
    """
    check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Write text (as UTF-8) or bytes in one piece; see ``open_atomically``."""
    with open_atomically(path, sync=sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)
