"""How do the bytes of a member get here?

By ``pread`` from a local shard: no shared file position, so threads and forked processes can use
one descriptor. A reader keeps a few shards open and reopens them in a process it is pickled to.
"""

import os
from collections import OrderedDict

from dist_siglip.data.faults import BadSampleError
from dist_siglip.data.pairs import Span

_OPEN_SHARDS = 64  # far above a block of shards, far below the usual limit of 1024


class ShardReader:
    """Read spans of shards, keeping the shards used last open.

    Args:
        max_member_bytes: longest span it agrees to read; bounds memory.
    """

    def __init__(self, max_member_bytes: int = 1 << 28) -> None:
        self._max_member_bytes = max_member_bytes
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, span: Span) -> bytes:
        """Return the bytes of a span.

        Raises:
            BadSampleError: if the span is too long, or the shard cannot be read or is shorter
                than when it was indexed.
        """
        if span.size > self._max_member_bytes:
            raise BadSampleError(f"member of {span.size} bytes, at most {self._max_member_bytes}")
        try:
            data = os.pread(self._open(span.shard), span.size, span.offset)
        except OSError as error:
            raise BadSampleError(f"shard cannot be read: {error}") from error
        if len(data) < span.size:
            raise BadSampleError(f"shard ends {span.size - len(data)} bytes early")
        return data

    def close(self) -> None:
        """Close every open shard; the next read opens again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _open(self, shard: str) -> int:
        """Return a descriptor of a shard, closing the one unused for longest beyond the limit."""
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(shard, os.O_RDONLY)
            if len(self._descriptors) > _OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def __getstate__(self) -> dict[str, object]:
        # Descriptors mean nothing in another process.
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        self.close()
