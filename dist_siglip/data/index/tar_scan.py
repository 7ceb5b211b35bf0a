"""Scan of a tar file: its members, and where their bytes are.

Only headers are read, never extracted: one ``pread`` of a few kilobytes usually covers the header
of an image, its caption and the next header. Plain ustar headers and the PAX headers that carry
nothing but times and owners (webdataset's writer adds one to every member) are read here; any
other kind of header (long names, links, sparse files) sends the whole file through the standard
library's ``tarfile``.

A complete archive ends with blocks of zeros. What lies behind them is looked at, too: another
archive (``cat a.tar b.tar``) is read on, anything else is damage. A file that ends without zeros
behind the last block of a member is usable, and is remarked upon.
"""

import errno
import io
import os
import tarfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import descriptor_of

BLOCK = 512
END = bytes(BLOCK)
REGULAR = (b"0", b"\0")
PAX = b"x"
_STRETCH = 1 << 20  # bytes compared with zeros at a time
# PAX keywords that move no byte and rename nothing.
_HARMLESS = frozenset({b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"})


def next_archive(descriptor: int, position: int) -> int:
    """Return where another archive begins behind the zeros that end one; else the file's size.

    Raises:
        tarfile.ReadError: if something else lies there.
    """
    size = os.fstat(descriptor).st_size
    found = _end_of_zeros(descriptor, position, size)
    if found < size and (found % BLOCK or not is_sound(os.pread(descriptor, BLOCK, found))):
        raise tarfile.ReadError(f"{size - found} bytes behind its end are no member")
    return found


def _end_of_zeros(descriptor: int, position: int, size: int) -> int:
    """Return where the first byte from a position on is that is not zero; else the size."""
    while position < size:
        if size - position > _STRETCH:
            position = _end_of_hole(descriptor, position, size)
        chunk = os.pread(descriptor, min(_STRETCH, size - position), position)
        if chunk != bytes(len(chunk)):
            return position + len(chunk) - len(chunk.lstrip(b"\0"))
        position += len(chunk) or size  # the file became shorter
    return size


def _end_of_hole(descriptor: int, position: int, size: int) -> int:
    """Return where bytes begin that a sparse file holds; the position itself if it is none."""
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except AttributeError:  # a system without it
        return position
    except OSError as error:
        return size if error.errno == errno.ENXIO else position


def is_sound(header: bytes) -> bool:
    """Compare the checksum of a header: the sum of its bytes, its own field counted as spaces.

    The low half of Adler-32 is 1 + the sum of all bytes, modulo 65521: twenty times faster than a
    sum in Python, and as good at telling headers from other bytes.
    """
    field = header[148:156]
    expected = read_octal(field)
    if expected is None:
        return False
    total = expected - 8 * ord(" ") + sum(field)
    return (1 + total) % 65521 == zlib.adler32(header) & 0xFFFF


def read_octal(field: bytes) -> int | None:
    """Read an octal number; None for another notation (sizes above 8 GB) or none at all."""
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:  # the digits 8 and 9
        return None


def name_of(header: bytes) -> str:
    """Join prefix and name; bytes that are not UTF-8 survive as surrogates, as in tarfile."""
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    joined = prefix + b"/" + name if prefix else name
    return joined.decode("utf-8", "surrogateescape")


def is_harmless(records: bytes) -> bool:
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


_WINDOW = 4096  # bytes read at a time: a header and a small member
_PAX_LIMIT = 1 << 16
_LARGEST_HEADER = 1 << 20  # bytes of a long name or of PAX records
# How a file begins that is no tar: what it is, and what to do about it.
_FOREIGN = {
    b"\x1f\x8b": "is compressed (gzip); write it unpacked: zcat FILE > NEW.tar",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); write it unpacked: zstdcat FILE > NEW.tar",
    b"\xfd7zXZ\0": "is compressed (xz); write it unpacked: xzcat FILE > NEW.tar",
    b"BZh": "is compressed (bzip2); write it unpacked: bzcat FILE > NEW.tar",
    b"\x04\x22\x4d\x18": "is compressed (lz4); write it unpacked: lz4cat FILE > NEW.tar",
    b"PK\3\4": "is a zip archive; write its files as a tar",
    b"PAR1": "is a Parquet file; give it a name that ends in .parquet",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; run git lfs pull",
}
_REMEDY = "fetch or write the shard again, or take it off the list"


class Member(NamedTuple):
    """A regular file inside a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


class TarScan(NamedTuple):
    """What a tar holds that can be read to its end.

    Attributes:
        members: its regular files, in file order.
        note: what is unusual about it, to be put behind its name; empty if nothing is.
        has_end: whether zeros end it, so that nothing is missing.
    """

    members: list[Member]
    note: str = ""
    has_end: bool = True


class DamagedTarError(UserError):
    """A tar file that cannot be read to its end."""

    def __init__(self, message: str, members: list[Member]) -> None:
        super().__init__(message)
        self.members = members


def scan_tar(path: str) -> TarScan:
    """List the regular members of an uncompressed tar file, in file order.

    Returns:
        Name, byte offset and byte size of each member. Folders are left out; so are links, devices
        and sparse files, which the note counts.

    Raises:
        DamagedTarError: if the file is empty, compressed, cut short, not a tar archive, or holds
            something else behind its end.
    """
    descriptor = descriptor_of(path)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise DamagedTarError(f"shard {path!r} is empty; {_REMEDY}", [])
        first = os.pread(descriptor, BLOCK, 0)
        for beginning, what in _FOREIGN.items():
            if first.startswith(beginning) and not is_sound(first):
                raise DamagedTarError(f"shard {path!r} {what}", [])
        found = _scan_headers(path, descriptor, size)
        return _scan_with_tarfile(path, descriptor, size) if found is None else found
    finally:
        os.close(descriptor)


def _scan_headers(path: str, descriptor: int, file_size: int) -> TarScan | None:
    """Walk plain headers; None if one of them needs ``tarfile``."""
    members: list[Member] = []
    window, start = b"", 0
    position, num_archives, is_promised = 0, 1, False
    while True:
        if position + BLOCK > start + len(window):
            window, start = os.pread(descriptor, _WINDOW, position), position
        header = window[position - start : position - start + BLOCK]
        if header == END:
            try:
                position = next_archive(descriptor, position)
            except tarfile.ReadError as error:
                raise _damaged(path, error, members) from None
            if position == file_size:
                return TarScan(members, _note(num_archives=num_archives))
            num_archives += 1
            continue
        if len(header) < BLOCK:
            if is_promised or not members or position > file_size or header.strip(b"\0"):
                raise DamagedTarError(
                    f"shard {path!r} is cut short after {file_size} bytes; {_REMEDY}", members
                )
            note = _note(num_archives=num_archives, has_end=False)
            return TarScan(members, note, has_end=False)
        kind = header[156:157]
        size = read_octal(header[124:136])
        if size is None or (kind not in REGULAR and kind != PAX) or not is_sound(header):
            return None
        offset = position + BLOCK
        if offset + size > file_size:
            raise DamagedTarError(
                f"shard {path!r} is cut short inside member {name_of(header)!r}; {_REMEDY}", members
            )
        is_promised = kind == PAX
        if is_promised:
            if size > _PAX_LIMIT or not is_harmless(os.pread(descriptor, size, offset)):
                return None
        else:
            name = name_of(header)
            if name.endswith("/"):  # a folder, in the oldest format
                return None
            members.append(Member(name, offset, size))
        position = offset + -(-size // BLOCK) * BLOCK


class _HeaderFile(io.BufferedReader):
    """A file whose reader asks for headers only: no header makes it read, or reserve, much."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class TarEntries:
    """All headers of an uncompressed tar as the standard library reads them, whatever they are.

    Going through them raises ``tarfile.TarError``, or ``ValueError``, ``OverflowError``,
    ``EOFError``, ``OSError``, if the file is damaged.

    Args:
        descriptor: stays open.

    Attributes:
        num_archives: archives of the file, one behind the other, so far.
        has_end: whether the last of these ends with zeros.
    """

    def __init__(self, descriptor: int) -> None:
        self.num_archives = 0
        self.has_end = True
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        position = 0
        while position < self._size and self.has_end:
            self.num_archives += 1
            end = yield from self._archive(position)
            block = os.pread(self._descriptor, BLOCK, end)
            self.has_end = block == END
            if self.has_end:
                position = next_archive(self._descriptor, end)
            elif block.strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {end}")

    def _archive(self, position: int) -> Generator[tarfile.TarInfo, None, int]:
        """Go through one archive; return where it ends."""
        with _open_archive(self._descriptor, position) as archive:
            yield from _forwards(archive)
            return archive.offset


def _forwards(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """List headers; a negative size would send ``tarfile`` round and round."""
    previous = -1
    for entry in archive:
        if entry.offset <= previous:
            raise tarfile.ReadError("a header points backwards")
        previous = entry.offset
        yield entry


@contextmanager
def _open_archive(descriptor: int, position: int) -> Iterator[tarfile.TarFile]:
    with _HeaderFile(io.FileIO(descriptor, "rb", closefd=False)) as file:
        file.seek(position)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            yield archive


def _scan_with_tarfile(path: str, descriptor: int, file_size: int) -> TarScan:
    """List the members with the standard library: slower, and knows every kind of header."""
    members: list[Member] = []
    left_out: list[str] = []
    entries = TarEntries(descriptor)
    try:
        for entry in entries:
            if entry.isreg() and not entry.issparse():
                if entry.offset_data + entry.size > file_size:
                    raise tarfile.ReadError("unexpected end of data")
                name = entry.name.partition("\0")[0]  # as in plain headers
                members.append(Member(name, entry.offset_data, entry.size))
            elif not entry.isdir():
                left_out.append(f"{entry.name!r} ({describe_entry(entry)})")
        if not entries.has_end and not members:
            raise tarfile.ReadError("no member, and no end")
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as error:
        raise _damaged(path, error, members) from error
    note = _note(num_archives=entries.num_archives, has_end=entries.has_end, left_out=left_out)
    return TarScan(members, note, has_end=entries.has_end)


def describe_entry(entry: tarfile.TarInfo) -> str:
    """Say what kind of member that is no plain file an entry is."""
    if entry.islnk():
        return f"a hard link to {entry.linkname!r}"
    if entry.issym():
        return f"a symbolic link to {entry.linkname!r}"
    return "a sparse file" if entry.issparse() else "a device"


def _damaged(path: str, error: Exception, members: list[Member]) -> DamagedTarError:
    return DamagedTarError(f"shard {path!r} is damaged or cut short ({error}); {_REMEDY}", members)


def _note(*, num_archives: int = 1, has_end: bool = True, left_out: Sequence[str] = ()) -> str:
    """Say what is unusual about a tar that can be read to its end."""
    notes = []
    if num_archives > 1:
        notes.append(
            f"holds {num_archives} archives, one behind the other: the members of all are used "
            "here, but other readers stop after the first"
        )
    if not has_end:
        notes.append(
            "has no end marker, as if its writer was interrupted: all its members are whole, but "
            "compare its size with that of the original"
        )
    if left_out:
        count = "a member that is" if len(left_out) == 1 else f"{len(left_out)} members that are"
        notes.append(
            f"holds {count} no plain file and not read, first {left_out[0]}: to keep links, write "
            "it with tar --dereference --hard-dereference"
        )
    return "; ".join(notes)
