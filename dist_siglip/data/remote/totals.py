"""What has the cache of a node done so far?

Five numbers in a small file of the cache folder, added to by every process under a lock that is
held for a few microseconds, once for each shard that is opened. A count is dropped rather than
waited for: these numbers are for people.
"""

import contextlib
import os
import struct
from typing import NamedTuple

from dist_siglip.data.remote.node_lock import hold

_LAYOUT = struct.Struct("<5q")
_PATIENCE_SECONDS = 1.0


class CacheTotals(NamedTuple):
    """Events since the cache folder was made, over all processes of the node.

    Attributes:
        hits: shards opened that were here.
        downloads: transfers that ended well, ahead of need or not.
        downloaded_bytes: what they brought.
        evictions: copies deleted to make room.
        retries: requests made again after a failure.
    """

    hits: int = 0
    downloads: int = 0
    downloaded_bytes: int = 0
    evictions: int = 0
    retries: int = 0

    def since(self, before: "CacheTotals") -> "CacheTotals":
        """Return what was added to earlier totals.

        Example:
            >>> CacheTotals(hits=5, downloads=2).since(CacheTotals(hits=1))
            CacheTotals(hits=4, downloads=2, downloaded_bytes=0, evictions=0, retries=0)
        """
        return CacheTotals(*(now - then for now, then in zip(self, before, strict=True)))

    def describe(self) -> str:
        """Describe them in one line.

        Example:
            >>> CacheTotals(3, 2, 3 * 2**30, 1, 0).describe()
            '2 downloads (3.00 GiB), 3 hits, 1 evictions, 0 retries'
        """
        return (
            f"{self.downloads} downloads ({self.downloaded_bytes / 2**30:.2f} GiB), "
            f"{self.hits} hits, {self.evictions} evictions, {self.retries} retries"
        )


def read_totals(file: str) -> CacheTotals:
    """Read the totals; zeros if there are none."""
    try:
        with open(file, "rb") as stream:
            return CacheTotals(*_LAYOUT.unpack(stream.read(_LAYOUT.size)))
    except (OSError, struct.error):
        return CacheTotals()


def add_to_totals(file: str, locks: str, added: CacheTotals) -> None:
    """Add events; they are dropped if the file cannot be locked or written.

    Args:
        file: the totals; made if it is missing.
        locks: the lock file of the cache.
        added: what happened.
    """
    with contextlib.suppress(TimeoutError, OSError), hold(locks, "totals", _PATIENCE_SECONDS):
        totals = (a + b for a, b in zip(read_totals(file), added, strict=True))
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(file, flags, 0o600)
        try:
            os.pwrite(descriptor, _LAYOUT.pack(*totals), 0)
        finally:
            os.close(descriptor)
