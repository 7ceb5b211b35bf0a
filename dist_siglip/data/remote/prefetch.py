"""Prefetch of remote shards by a thread of one process per node.

It asks from time to time which shards come next, and fetches them in that order, as far ahead as
half of the cache reaches: the other half stays for what is being read. Every round marks all these
shards as used, so the cache evicts what lies behind first. A shard that cannot be fetched is passed
over, and tried again after a pause that doubles.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable

from dist_siglip.data.remote.cache import ShardCache
from dist_siglip.data.remote.connections import RemoteError, StoppedError, stoppable
from dist_siglip.data.remote.locations import is_remote

_LOGGER = logging.getLogger(__name__)
_MOST_AHEAD = 256  # shards, however small
_LONGEST_RETRY = 32  # times retry_seconds


class Prefetcher:
    """Fetches shards ahead of the readers; never raises into training.

    Args:
        cache: where they go.
        upcoming: names the shards needed from now on, in order; asked again for every round.
        pause_seconds: between two rounds.
        retry_seconds: pause after the first failure of a shard; failures are logged.
    """

    def __init__(
        self,
        cache: ShardCache,
        upcoming: Callable[[], Iterable[str]],
        *,
        pause_seconds: float = 1.0,
        retry_seconds: float = 30.0,
    ) -> None:
        self._cache = cache
        self._upcoming = upcoming
        self._pause_seconds = pause_seconds
        self._retry_seconds = retry_seconds
        self._failures: dict[str, tuple[int, float]] = {}  # how many, and not again before
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; does nothing if it has begun."""
        if self._thread is None:
            self._stopped = threading.Event()  # an earlier thread keeps its own
            self._thread = threading.Thread(
                target=self._run, args=(self._stopped,), name="shard prefetch", daemon=True
            )
            self._thread.start()

    def stop(self, patience_seconds: float = 5.0) -> None:
        """End, also in the middle of a transfer, and wait for it."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(patience_seconds)
            self._thread = None

    def fetch_ahead(self) -> int:
        """Go one round; return how many bytes ahead are here now.

        Raises:
            UserError: if the cache is full or closed.
        """
        ahead, seen = 0, set[str]()
        for shard in self._upcoming():
            if shard in seen or len(seen) >= _MOST_AHEAD:
                break  # the data set is smaller than the way ahead
            seen.add(shard)
            if is_remote(shard):
                ahead += self._fetch(shard)
            if ahead >= self._cache.max_bytes // 2:
                break
        return ahead

    def _fetch(self, shard: str) -> int:
        """Return the bytes of a shard that is here now; 0 if it is unavailable for now."""
        failures, not_before = self._failures.get(shard, (0, 0.0))
        if time.monotonic() < not_before:
            return 0
        try:
            size = self._cache.hold_ready(shard)
        except RemoteError as error:
            wait = self._retry_seconds * min(2**failures, _LONGEST_RETRY)
            self._failures[shard] = failures + 1, time.monotonic() + wait
            _LOGGER.warning("fetching ahead: %s; again in %.0f s", error, wait)
            return 0
        self._failures.pop(shard, None)
        return size

    def _run(self, stopped: threading.Event) -> None:
        try:
            with stoppable(stopped):
                while not stopped.is_set():
                    pause = self._pause_seconds
                    try:
                        self.fetch_ahead()
                    except Exception as error:  # noqa: BLE001 - readers say what is wrong
                        _LOGGER.warning("fetching ahead: %s: %s", type(error).__name__, error)
                        pause = self._retry_seconds
                    stopped.wait(pause)
        except StoppedError:
            pass


def describe_tight_cache(cache: ShardCache, shard_bytes: list[int], block_shards: int) -> str:
    """Warn if two blocks of shards do not fit a cache.

    The order mixes ``block_shards`` shards at a time; while one block is read the next one is
    fetched. What does not fit is fetched again and again.

    Returns:
        One line for the log; empty if they fit.
    """
    largest = sum(sorted(shard_bytes)[-2 * block_shards :])
    if largest <= cache.max_bytes:
        return ""
    return (
        f"cache.max_gib ({cache.settings.max_gib:g}) holds less than two blocks of shards "
        f"({largest / 2**30:.3g} GiB): shards will be fetched more than once an epoch; raise it or "
        f"lower block_shards ({block_shards})"
    )
