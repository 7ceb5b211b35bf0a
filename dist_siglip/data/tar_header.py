"""The headers of a tar file: which bytes are one, and what it says.

Only plain ustar headers, and those of PAX that carry nothing but times and owners, are read here;
``tar_scan`` leaves the rest to the standard library. The end of an archive is a block of zeros,
behind which another archive may begin.
"""

import errno
import os
import tarfile
import zlib

BLOCK = 512
END = bytes(BLOCK)
REGULAR = (b"0", b"\0")
PAX = b"x"
_STRETCH = 1 << 20  # bytes compared with zeros at a time
# PAX keywords that move no byte and rename nothing.
_HARMLESS = frozenset({b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"})


def read_header(header: bytes) -> tuple[str, int] | None:
    """Read name and size of the member a plain header belongs to; None for any other block.

    Args:
        header: 512 bytes.
    """
    size = read_octal(header[124:136])
    if len(header) < BLOCK or size is None or header[156:157] not in REGULAR:
        return None
    return (name_of(header), size) if is_sound(header) else None


def extra_header_bytes(header: bytes) -> int:
    """Return how many bytes a PAX header and its records take; 0 for any other block.

    Args:
        header: 512 bytes.
    """
    size = read_octal(header[124:136])
    if len(header) < BLOCK or size is None or header[156:157] != PAX or not is_sound(header):
        return 0
    return BLOCK + -(-size // BLOCK) * BLOCK


def next_archive(descriptor: int, position: int) -> int:
    """Return where another archive begins behind the zeros that end one; else the file's size.

    Args:
        descriptor: of the file.
        position: of the first block of zeros.

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
