"""A few bytes of a page that is compressed by snappy, unpacked without the page.

The encoder of snappy compresses every 64 KiB by themselves. Where each begins in the compressed
bytes is found once, by walking over the lengths of literals and copies; a value is then unpacked
from those it lies in, which snappy takes as a stream of their own. pyarrow writes a row group of
pictures as one page, in snappy unless told otherwise, so that is the usual case.

A stream of another encoder, whose copies reach further back, is noticed, and read whole.
"""

import os
from typing import NamedTuple

from dist_siglip.data.parquet import ParquetError, UnknownEncodingError

_FRAGMENT = 1 << 16
_MOST_TAGS = 1 << 18  # of a page; pictures that are compressed already have a few in 64 KiB


class SnappyFragments(NamedTuple):
    """Where the fragments of a compressed stream lie.

    Attributes:
        starts: offset of each in the file; last, the end of the stream.
        full_size: bytes of the stream decompressed.
    """

    starts: list[int]
    full_size: int

    def read(self, descriptor: int, offset: int, size: int) -> bytes:
        """Unpack some bytes.

        Args:
            descriptor: of the file.
            offset: of the first in the decompressed stream.
            size: how many.

        Raises:
            UnknownEncodingError: if the fragments cannot be unpacked by themselves.
            ParquetError: if the file became shorter.
        """
        from pyarrow import Codec

        if not size:
            return b""
        first, last = offset // _FRAGMENT, -(-(offset + size) // _FRAGMENT)
        begin, end = self.starts[first], self.starts[last]
        stored = os.pread(descriptor, end - begin, begin)
        if len(stored) < end - begin:
            raise ParquetError(f"shard ends {end - begin - len(stored)} bytes early")
        length = min(last * _FRAGMENT, self.full_size) - first * _FRAGMENT
        try:
            found = Codec("snappy").decompress(_varint(length) + stored, length, asbytes=True)
        except OSError as error:
            raise UnknownEncodingError("a part of a page cannot be unpacked alone") from error
        inside = offset - first * _FRAGMENT
        return found[inside : inside + size]


def find_fragments(stored: bytes, offset: int, full_size: int) -> SnappyFragments | None:
    """Walk over a stream.

    Args:
        stored: the stream.
        offset: of its first byte in the file.
        full_size: bytes it has decompressed.

    Returns:
        None if it is not of fragments, or of too many short pieces.

    Example:
        >>> find_fragments(bytes([3, 8]) + b"hen", 100, 3)
        SnappyFragments(starts=[101, 105], full_size=3)
    """
    position = next((i + 1 for i, byte in enumerate(stored[:5]) if byte < 128), 0)
    starts, done, end = [offset + position], 0, len(stored)
    for _ in range(_MOST_TAGS):
        if position >= end:
            break
        tag = stored[position]
        length, kind = (tag >> 2) + 1, tag & 3
        if kind:  # a copy: two, three or five bytes
            length = (tag >> 2 & 7) + 4 if kind == 1 else length
            position += (2, 3, 5)[kind - 1]
        else:
            more = max(0, length - 60)  # bytes that hold the length of a long literal
            if more:
                length = int.from_bytes(stored[position + 1 : position + 1 + more], "little") + 1
            position += 1 + more + length
        done += length
        if done >= len(starts) * _FRAGMENT or done == full_size:
            if done != min(len(starts) * _FRAGMENT, full_size):
                return None
            starts.append(offset + position)
    return SnappyFragments(starts, full_size) if position == end and done == full_size else None


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
