"""May this thread go on waiting?

A thread that works ahead of training must end as soon as it is told to, also in the middle of a
transfer. It gives an event to its own waits: each of them ends soon after the event is set. Other
threads wait as usual.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_STEP_SECONDS = 0.1
_THREAD = threading.local()


class StoppedError(BaseException):
    """This thread was told to stop; no failure, so nothing that catches failures may catch it."""


@contextmanager
def stoppable(stopped: threading.Event) -> Iterator[None]:
    """Let the waits of this thread end once an event is set, while the block runs."""
    _THREAD.stopped = stopped
    try:
        yield
    finally:
        _THREAD.stopped = None


def longest_wait(seconds: float) -> float:
    """Return how long this thread may wait in one go.

    Raises:
        StoppedError: if it was told to stop.
    """
    stopped: threading.Event | None = getattr(_THREAD, "stopped", None)
    if stopped is None:
        return seconds
    if stopped.is_set():
        raise StoppedError
    return min(seconds, _STEP_SECONDS)


def pause(seconds: float) -> None:
    """Sleep.

    Raises:
        StoppedError: soon after this thread is told to stop.
    """
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(longest_wait(left))
