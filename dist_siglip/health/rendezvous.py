"""Which ranks are there, and what does each of them say, before any process group exists?

A process group whose ranks do not all come ends in a time limit that names nobody. So the ranks
meet in a store first: every rank says what it has to say, the first one hears them all and answers.
Every wait has a limit, after which it is known who did not speak.
"""

import json
import time
from collections.abc import Collection
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not marked so
from torch.distributed.distributed_c10d import PrefixStore, Store

_GOODBYE_SECONDS = 5.0  # the first rank holds the store and leaves last


class Meeting:
    """Ranks that talk through a store.

    Args:
        store: reached by all ranks, with nothing of an earlier meeting in it.
        rank: this process.
        world_size: ranks that are expected.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size

    def tell(self, occasion: str, value: Any) -> None:
        """Say something to the first rank, in plain JSON values."""
        self.store.set(f"{occasion}/{self.rank}", json.dumps(value))

    def hear_all(
        self, occasion: str, limit_seconds: float, ranks: Collection[int] | None = None
    ) -> list[Any]:
        """Return what every rank has told, in rank order; None for one that did not in time.

        Args:
            occasion: when they told it.
            limit_seconds: longest wait for all of them together.
            ranks: the only ones that are waited for; all by default.
        """
        wanted = range(self.world_size) if ranks is None else ranks
        self._wait([f"{occasion}/{rank}" for rank in wanted], limit_seconds)
        keys = [f"{occasion}/{rank}" for rank in range(self.world_size)]
        return [self._read(key) if self.store.check([key]) else None for key in keys]

    def answer(self, occasion: str, value: Any) -> None:
        """Say something to all ranks; only the first one does."""
        self.store.set(f"{occasion}/answer", json.dumps(value))

    def hear_answer(self, occasion: str, limit_seconds: float) -> Any:
        """Return what the first rank answers; None if it does not in time, or is gone."""
        key = f"{occasion}/answer"
        return self._read(key) if self._wait([key], limit_seconds) else None

    def leave(self, num_present: int) -> None:
        """Go; the first rank waits for the others, for a moment.

        Args:
            num_present: ranks that are known to be there.
        """
        try:
            self.store.add("gone", 1)
            deadline = time.monotonic() + _GOODBYE_SECONDS
            while self.rank == 0 and self.store.add("gone", 0) < num_present:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)
        except RuntimeError:
            return  # the store is gone, and with it everybody who could wait

    def _wait(self, keys: list[str], limit_seconds: float) -> bool:
        try:
            self.store.wait(keys, timedelta(seconds=max(0.01, limit_seconds)))
        except RuntimeError:
            return False
        return True

    def _read(self, key: str) -> Any:
        return json.loads(self.store.get(key))


def meet(
    rank: int,
    world_size: int,
    *,
    address: str,
    port: int,
    limit_seconds: float,
    is_served: bool = False,
    name: str = "meeting",
) -> Meeting:
    """Go to where the ranks meet.

    Args:
        rank: this process; rank 0 opens the place unless it ``is_served``.
        world_size: ranks that are expected.
        address: host of rank 0.
        port: free on that host.
        limit_seconds: longest wait for rank 0.
        is_served: whether the launcher holds a store at this address, as torchrun does.
        name: tells meetings of one store apart.

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
    return Meeting(PrefixStore(name, store), rank, world_size)
