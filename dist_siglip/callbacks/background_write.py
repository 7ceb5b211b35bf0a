"""How is a checkpoint written while training goes on?

It is copied to the memory of the host, which training waits for; a thread writes the copy. There
is one at a time: who starts the next one waits for the one before.
"""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor


class BackgroundWrite:
    """One piece of work at a time in a thread; it is done before Python ends."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: tuple[int, Future[None]] | None = None

    def start(self, step: int, work: Callable[[], None]) -> None:
        """Begin; what was begun before has been finished."""
        assert self._running is None, "two checkpoints would be written at once"
        self._running = (step, self._threads.submit(work))

    @property
    def step(self) -> int | None:
        """The step whose checkpoint is begun and not finished."""
        return None if self._running is None else self._running[0]

    def finish(self) -> None:
        """Wait until it is written.

        Raises:
            OSError: if it could not be.
        """
        if self._running is not None:
            _, future = self._running
            self._running = None
            future.result()

    def wait(self) -> None:
        """Wait until it is written or has failed; ``finish`` tells which."""
        if self._running is not None:
            wait([self._running[1]])


def snapshot(value: Any) -> Any:
    """Copy a nest of tensors and plain values; tensors to the memory of the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(snapshot, value))
    return copy.deepcopy(value)
