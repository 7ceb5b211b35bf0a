"""How does a folder appear only when it is complete, and never in place of something else?

As with single files: everything is written beside the final name, synced, and renamed at the end.
A folder is replaced only on request, and only if it is an export itself.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from dist_siglip.errors import UserError

# The file by which an export is known.
MARK = "export.json"


@contextmanager
def whole_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Hand out a new folder that gets its final name when the block ends without an error.

    Args:
        folder: final name; its parents are made.
        overwrite: replace an earlier export of this name.

    Raises:
        UserError: If ``folder`` is a file, cannot be made, or holds files and may not be replaced.
    """
    _refuse_to_replace(folder, overwrite)
    beside = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out ({folder}) cannot be made: {error.strerror or error}") from error
    try:
        yield beside
        for path in (*beside.iterdir(), beside):
            _sync(path)
        _rename(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _sync(folder.parent)


def _refuse_to_replace(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"out ({folder}) is a file; name a folder")
    if not any(folder.iterdir()):
        return
    if not (folder / MARK).is_file():
        raise UserError(f"out ({folder}) holds files of others (no {MARK}); name another folder")
    if not overwrite:
        raise UserError(f"out ({folder}) holds an export; name another folder, or add --overwrite")


def _rename(beside: Path, folder: Path) -> None:
    """Rename, with an earlier export out of the way and back again if that fails."""
    if not folder.exists():
        beside.rename(folder)
        return
    former = folder.with_name(f".{folder.name}.{uuid4().hex}.old")
    folder.rename(former)
    try:
        beside.rename(folder)
    except BaseException:
        former.rename(folder)
        raise
    shutil.rmtree(former)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
