"""Messages between ranks through a store, without a collective, which would hang with them.

Every wait has a limit, after which it is known which ranks did not speak.
"""

import json
import time
from collections.abc import Collection
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not marked so
from torch.distributed.distributed_c10d import PrefixStore, Store

_GOODBYE_SECONDS = 5.0  # the first rank holds the store and leaves last


class StoreChannel:
    """Ranks that exchange JSON values through a store.

    Args:
        store: reached by all ranks, with nothing of an earlier channel in it.
        rank: this process.
        world_size: ranks that are expected.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size

    def publish(self, occasion: str, value: Any) -> None:
        """Write down a value of this rank, of plain JSON."""
        self.store.set(f"{occasion}/{self.rank}", json.dumps(value))

    def gather(
        self, occasion: str, limit_seconds: float, ranks: Collection[int] | None = None
    ) -> list[Any]:
        """Return what every rank has published, in rank order; None for one that did not in time.

        Three requests to the store; some 2 log2(W) more for each rank that is missing.

        Args:
            occasion: the name under which they published it.
            limit_seconds: longest wait for all of them together.
            ranks: those to wait for; all if None.
        """
        wanted = range(self.world_size) if ranks is None else ranks
        self._wait([f"{occasion}/{rank}" for rank in wanted], limit_seconds)
        keys = [f"{occasion}/{rank}" for rank in range(self.world_size)]
        missing = self._missing(keys)
        present = [key for key in keys if key not in missing]
        found = dict(zip(present, self.store.multi_get(present), strict=True)) if present else {}
        return [json.loads(found[key]) if key in found else None for key in keys]

    def broadcast(self, occasion: str, value: Any) -> None:
        """Write down a value for all ranks; one rank does."""
        self.store.set(f"{occasion}/answer", json.dumps(value))

    def receive(self, occasion: str, limit_seconds: float) -> Any:
        """Return the value for all ranks; None if it does not come in time, or its rank is gone."""
        key = f"{occasion}/answer"
        return self._read(key) if self._wait([key], limit_seconds) else None

    def receive_now(self, occasion: str) -> Any:
        """Return the value for all ranks; None if there is none yet."""
        key = f"{occasion}/answer"
        return self._read(key) if self.store.check([key]) else None

    def leave(self, num_present: int, limit_seconds: float = _GOODBYE_SECONDS) -> None:
        """Note that this rank is done; the first, which may hold the store, waits for the others.

        Args:
            num_present: ranks that are known to be there, the first one included.
            limit_seconds: longest wait.
        """
        try:
            if self.rank:
                self.store.add("gone", 1)
                return
            deadline = time.monotonic() + limit_seconds
            while self.store.add("gone", 0) < num_present - 1 and time.monotonic() < deadline:
                time.sleep(0.02)
        except RuntimeError:
            return  # the store is gone, and with it everybody who could wait

    def _wait(self, keys: list[str], limit_seconds: float) -> bool:
        try:
            self.store.wait(keys, timedelta(seconds=max(0.01, limit_seconds)))
        except RuntimeError:
            return False
        return True

    def _missing(self, keys: list[str]) -> set[str]:
        """Return the keys that nobody has set, halving until they are found."""
        if self.store.check(keys):
            return set()
        if len(keys) == 1:
            return set(keys)
        half = len(keys) // 2
        return self._missing(keys[:half]) | self._missing(keys[half:])

    def _read(self, key: str) -> Any:
        return json.loads(self.store.get(key))


def rendezvous(
    rank: int,
    world_size: int,
    *,
    address: str,
    port: int,
    limit_seconds: float,
    is_served: bool = False,
    name: str,
) -> StoreChannel:
    """Join the ranks in a store, before any process group exists.

    Args:
        rank: this process; rank 0 serves the store unless it ``is_served``.
        world_size: ranks that are expected.
        address: host of rank 0.
        port: free on that host.
        limit_seconds: longest wait for rank 0.
        is_served: whether the launcher holds a store at this address, as torchrun does.
        name: tells channels of one store apart.

    Raises:
        RuntimeError: if rank 0 cannot be reached, or the port is taken.
    """
    store = TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0 and not is_served,
        timeout=timedelta(seconds=limit_seconds),
        wait_for_workers=False,
    )
    return StoreChannel(PrefixStore(name, store), rank, world_size)
