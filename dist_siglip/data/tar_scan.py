"""Which members does a tar file hold, and where are their bytes?

Only headers are read, never extracted: one ``pread`` of a few kilobytes usually covers the header
of an image, its caption and the next header. Plain ustar headers and the PAX headers that carry
nothing but times and owners (webdataset's writer adds one to every member) are read here; any
other kind of header (long names, links, sparse files) sends the whole file through the standard
library's ``tarfile``. Both ways find a file that was cut short, even exactly between two
members: a complete archive ends with a block of zeros.
"""

import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dist_siglip.errors import UserError
from dist_siglip.regular_file import descriptor_of

_BLOCK = 512
_WINDOW = 4096  # bytes read at a time: a header and a small member
_END = bytes(_BLOCK)
_REGULAR = (b"0", b"\0")
_PAX = b"x"
_PAX_LIMIT = 1 << 16
_LARGEST_HEADER = 1 << 20  # bytes of a long name or of PAX records
# PAX keywords that move no byte and rename nothing.
_HARMLESS = frozenset({b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"})
_GZIP = b"\x1f\x8b"
_REMEDY = "fetch or write the shard again, or take it off the list"


class Member(NamedTuple):
    """A regular file inside a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


class DamagedTarError(UserError):
    """A tar file that cannot be read to its end.

    Attributes:
        members: the whole members before the damage.
    """

    def __init__(self, message: str, members: list[Member]) -> None:
        super().__init__(message)
        self.members = members


def scan_tar(path: str) -> list[Member]:
    """List the regular members of an uncompressed tar file, in file order.

    Args:
        path: local file.

    Returns:
        Name, byte offset and byte size of each member. Folders and links are left out.

    Raises:
        DamagedTarError: if the file is empty, compressed, cut short, or not a tar archive.
    """
    descriptor = descriptor_of(path)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise DamagedTarError(f"shard {path!r} is empty; {_REMEDY}", [])
        if os.pread(descriptor, 2, 0) == _GZIP:
            raise DamagedTarError(f"shard {path!r} is compressed; unpack it with gunzip", [])
        members = _scan_headers(path, descriptor, size)
        return _scan_with_tarfile(path, descriptor) if members is None else members
    finally:
        os.close(descriptor)


def read_header(header: bytes) -> tuple[str, int] | None:
    """Read name and size of the member a plain header belongs to; None for any other block.

    Args:
        header: 512 bytes.
    """
    size = _octal(header[124:136])
    if len(header) < _BLOCK or size is None or header[156:157] not in _REGULAR:
        return None
    return (_name(header), size) if _is_sound(header) else None


def extra_header_bytes(header: bytes) -> int:
    """Return how many bytes a PAX header and its records take; 0 for any other block.

    Args:
        header: 512 bytes.
    """
    size = _octal(header[124:136])
    if len(header) < _BLOCK or size is None or header[156:157] != _PAX or not _is_sound(header):
        return 0
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


def _scan_headers(path: str, descriptor: int, file_size: int) -> list[Member] | None:
    """Walk plain headers; None if one of them needs ``tarfile``."""
    members: list[Member] = []
    window, start = b"", 0
    position = 0
    while True:
        if position + _BLOCK > start + len(window):
            window, start = os.pread(descriptor, _WINDOW, position), position
        header = window[position - start : position - start + _BLOCK]
        if header == _END:
            return members
        if len(header) < _BLOCK:
            raise DamagedTarError(
                f"shard {path!r} is cut short after {file_size} bytes; {_REMEDY}", members
            )
        kind = header[156:157]
        size = _octal(header[124:136])
        if size is None or (kind not in _REGULAR and kind != _PAX) or not _is_sound(header):
            return None
        offset = position + _BLOCK
        if offset + size > file_size:
            raise DamagedTarError(
                f"shard {path!r} is cut short inside member {_name(header)!r}; {_REMEDY}", members
            )
        if kind == _PAX:
            if size > _PAX_LIMIT or not _is_harmless(os.pread(descriptor, size, offset)):
                return None
        else:
            name = _name(header)
            if name.endswith("/"):  # a folder, in the oldest format
                return None
            members.append(Member(name, offset, size))
        position = offset + -(-size // _BLOCK) * _BLOCK


class _HeaderFile(io.BufferedReader):
    """A file whose reader asks for headers only: no header makes it read, or reserve, much."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


@contextmanager
def open_archive(descriptor: int) -> Iterator[tarfile.TarFile]:
    """Open an uncompressed tar with the standard library, for ``entries_of``.

    Args:
        descriptor: stays open.
    """
    with (
        _HeaderFile(io.FileIO(descriptor, "rb", closefd=False)) as file,
        tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive,
    ):
        yield archive


def entries_of(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """List the headers of an archive, whatever they are.

    Raises:
        tarfile.TarError: or ``ValueError``, ``OverflowError``, ``EOFError``, ``OSError``, if it is
            damaged.
    """
    previous = -1
    for entry in archive:
        if entry.offset <= previous:  # a negative size would send tarfile round and round
            raise tarfile.ReadError("a header points backwards")
        previous = entry.offset
        yield entry


def _scan_with_tarfile(path: str, descriptor: int) -> list[Member]:
    """List the members with the standard library: slower, and knows every kind of header."""
    members: list[Member] = []
    try:
        file_size = os.fstat(descriptor).st_size
        with open_archive(descriptor) as archive:
            for entry in entries_of(archive):
                if entry.isreg() and not entry.issparse():
                    if entry.offset_data + entry.size > file_size:
                        raise tarfile.ReadError("unexpected end of data")
                    name = entry.name.partition("\0")[0]  # as in plain headers
                    members.append(Member(name, entry.offset_data, entry.size))
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as error:
        raise DamagedTarError(
            f"shard {path!r} is damaged or cut short ({error}); {_REMEDY}", members
        ) from error
    if os.pread(descriptor, _BLOCK, end) != _END:
        raise DamagedTarError(
            f"shard {path!r} is damaged or cut short at byte {end}; {_REMEDY}", members
        )
    return members


def _is_sound(header: bytes) -> bool:
    """Compare the checksum of a header: the sum of its bytes, its own field counted as spaces.

    The low half of Adler-32 is 1 + the sum of all bytes, modulo 65521: twenty times faster than a
    sum in Python, and as good at telling headers from other bytes.
    """
    field = header[148:156]
    expected = _octal(field)
    if expected is None:
        return False
    total = expected - 8 * ord(" ") + sum(field)
    return (1 + total) % 65521 == zlib.adler32(header) & 0xFFFF


def _octal(field: bytes) -> int | None:
    """Read an octal number; None for another notation (sizes above 8 GB) or none at all."""
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:  # the digits 8 and 9
        return None


def _name(header: bytes) -> str:
    """Join prefix and name; bytes that are not UTF-8 survive as surrogates, as in tarfile."""
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    joined = prefix + b"/" + name if prefix else name
    return joined.decode("utf-8", "surrogateescape")


def _is_harmless(records: bytes) -> bool:
    """Tell whether PAX records ("<length> <keyword>=<value>" lines) change no name or size."""
    position = 0
    while position < len(records):
        space = records.find(b" ", position, position + 20)
        equals = records.find(b"=", position)
        if space < 0 or equals < space or not records[position:space].isdigit():
            return False
        if records[space + 1 : equals] not in _HARMLESS:
            return False
        length = int(records[position:space])
        if length < equals - position:
            return False
        position += length
    return True
