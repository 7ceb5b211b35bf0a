"""Reading of regular files only: a pipe or a device under their name is refused.

Opening a pipe waits for a writer without end, before anything watches; a device gives bytes without
end. So files are opened without waiting, and used only if they are regular. The failures are
``OSError``, as those of a missing file.
"""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TextIO

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: if it cannot be opened, or is no regular file.

    Example:
        >>> open_regular("/dev/null")
        Traceback (most recent call last):
            ...
        OSError: [Errno 22] is a device, not a regular file: '/dev/null'
    """
    return open(path, "rb", opener=lambda name, flags: descriptor_of(name))


def open_text(
    path: str | os.PathLike[str],
    *,
    encoding: str = "utf-8",
    errors: str = "strict",
    newline: str | None = None,
) -> TextIO:
    """Open a file of text for reading; as ``open_regular``."""
    return io.TextIOWrapper(open_regular(path), encoding=encoding, errors=errors, newline=newline)


def read_json(path: str | os.PathLike[str], most_bytes: int | None = None) -> Any:
    """Read a file of JSON.

    Raises:
        OSError: as ``read_regular``.
        ValueError: if it is no JSON in UTF-8, or nested too deeply.
    """
    content = read_regular(path, most_bytes).decode()
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def descriptor_of(path: str | os.PathLike[str]) -> int:
    """Return a descriptor of a file to read from; as ``open_regular``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_others(os.fstat(descriptor).st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: str | os.PathLike[str], most_bytes: int | None = None) -> bytes:
    """Read a whole file.

    Raises:
        OSError: if it cannot be read, is no regular file, or is larger than ``most_bytes``.
    """
    with open_regular(path) as file:
        content = file.read(-1 if most_bytes is None else most_bytes + 1)
    if most_bytes is not None and len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"is larger than {most_bytes:,} bytes", str(path))
    return content


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is there and no regular file, for readers that take a path.

    Raises:
        OSError: if it is a folder, a pipe, a socket or a device, or cannot be looked at.
    """
    _refuse_others(Path(path).stat().st_mode, path)


def open_to_append(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to append to and to read from, unbuffered; it is made if it is missing.

    A device, such as /dev/null, may be written to as well.

    Raises:
        OSError: if it cannot be opened, or is a pipe or a socket.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        mode = os.stat(descriptor).st_mode
        if not stat.S_ISCHR(mode):
            _refuse_others(mode, path)
        return os.fdopen(descriptor, "ab+", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_others(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", str(path))
