"""Reader of the bytes of members.

They are read by ``pread``: no shared file position, so threads and forked processes can use one
descriptor. A remote shard is read from its copy in the cache of the node. A reader keeps a few
shards open, and the rows of tables, and reopens them in a process it is pickled to; a copy that was
evicted is closed, so that its space on the disk is free. Of a Parquet shard the span names a cell,
which its rows find.
"""

import errno
import os
from collections import OrderedDict
from collections.abc import Collection

from dist_siglip.data.index.pairs import Span
from dist_siglip.data.index.table_rows import TableError, TableRows
from dist_siglip.data.parquet import ParquetError
from dist_siglip.data.parquet.rows import Kept, ParquetRows
from dist_siglip.data.remote import RemoteError, ShardCache, is_remote
from dist_siglip.data.remote.locations import is_parquet, is_table
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.system.regular_file import descriptor_of

_OPEN_SHARDS = 64  # far above a block of shards, far below the usual limit of 1024

# No sample is bad for it, and the next one would fare no better.
_OF_THIS_PROCESS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class ShardReader:
    """Read spans of shards, keeping the shards used last open.

    Args:
        cache: copies of remote shards; None if there are none to read.
        max_member_bytes: longest span it agrees to read; bounds memory.
        fields: of the .json that will be looked at, as ``CaptionRule`` names them: those columns
            a row of Parquet stands for. None for all.
    """

    def __init__(
        self,
        cache: ShardCache | None = None,
        max_member_bytes: int = 1 << 28,
        fields: Collection[str] | None = None,
    ) -> None:
        self._cache = cache
        self._max_member_bytes = max_member_bytes
        self._fields = fields
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._tables: dict[str, TableRows] = {}
        self._rows: dict[str, ParquetRows] = {}
        self._kept = Kept()

    def read(self, span: Span) -> bytes:
        """Return the bytes of a span.

        Raises:
            BadSampleError: if the span is too long, or the shard cannot be read, does not exist any
                more, or is shorter than when it was indexed.
            UserError: if the cache is full or closed, or access is denied.
            OutageError: if the server of the shard does not answer.
            OSError: if this process may open no more files, or has no memory.
        """
        is_cell = is_parquet(span.shard)
        if span.size > self._max_member_bytes and not is_cell:
            raise BadSampleError(f"member of {span.size} bytes, at most {self._max_member_bytes}")
        try:
            if is_table(span.shard):
                return self._read_row(span)
            descriptor = self._open(span.shard)
            if is_cell:
                return self._rows_of(span.shard, descriptor).read(span.offset)
            data = os.pread(descriptor, span.size, span.offset)
        except ParquetError as error:
            raise BadSampleError(str(error)) from None
        except OSError as error:
            if error.errno in _OF_THIS_PROCESS:
                raise
            raise BadSampleError(f"shard cannot be read: {error}") from error
        except RemoteError as error:
            if not error.is_missing:  # the sample may be sound
                raise
            raise BadSampleError(str(error)) from error
        if len(data) < span.size:
            raise BadSampleError(f"shard ends {span.size - len(data)} bytes early")
        return data

    def _read_row(self, span: Span) -> bytes:
        """Read a member of a row, which must be what it was when the table was indexed."""
        try:
            if span.shard not in self._tables:
                self._tables[span.shard] = TableRows(span.shard)
            data = self._tables[span.shard].read(span.offset)
        except TableError as error:
            raise BadSampleError(str(error)) from error
        if len(data) != span.size:
            raise BadSampleError(f"file of {len(data)} bytes, {span.size} when it was indexed")
        return data

    def close(self) -> None:
        """Close every open shard; the next read opens again."""
        self._tables.clear()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        self._rows.clear()
        self._kept = Kept()

    def _rows_of(self, shard: str, descriptor: int) -> ParquetRows:
        if shard not in self._rows:
            self._rows[shard] = ParquetRows(
                descriptor, self._kept, shard=shard, fields=self._fields
            )
        return self._rows[shard]

    def _open(self, shard: str) -> int:
        """Return a descriptor of a shard, closing the one unused for longest beyond the limit."""
        if shard not in self._descriptors:
            if is_remote(shard):
                self._close_evicted()
                if self._cache is None:
                    raise BadSampleError("shard is remote, and there is no cache for it")
                self._descriptors[shard] = self._cache.open(shard)
            else:
                self._descriptors[shard] = descriptor_of(shard)
            if len(self._descriptors) > _OPEN_SHARDS:
                self._forget(next(iter(self._descriptors)))
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def _close_evicted(self) -> None:
        """Close copies that have no name any more."""
        for shard, descriptor in list(self._descriptors.items()):
            if os.fstat(descriptor).st_nlink == 0:
                self._forget(shard)

    def _forget(self, shard: str) -> None:
        os.close(self._descriptors.pop(shard))
        if self._rows.pop(shard, None) is not None:
            self._kept.forget(shard)

    def __getstate__(self) -> dict[str, object]:
        # Descriptors mean nothing in another process.
        fresh = {"_descriptors": OrderedDict(), "_tables": {}, "_rows": {}, "_kept": Kept()}
        return {**self.__dict__, **fresh}

    def __del__(self) -> None:
        self.close()
