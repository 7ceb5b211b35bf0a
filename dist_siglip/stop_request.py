"""Has anybody asked this process to stop?

A cluster asks by a signal: SIGUSR1 or SIGUSR2 some minutes ahead, SIGTERM at the end. The handler
only remembers it. Saving inside a handler deadlocks when another rank is in the middle of an
exchange, so the ranks look at what was remembered between two steps, and agree.

Imports nothing heavy: a signal during the seconds of importing torch must not end the process.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
_asked: list[int] = []


def _remember(number: int, frame: FrameType | None) -> None:
    _asked.append(number)


@contextmanager
def listening() -> Iterator[None]:
    """Remember the signals inside the block; afterwards none is remembered.

    Outside the main thread, where Python takes no signals, it does nothing.

    Example:
        >>> with listening():
        ...     signal.raise_signal(signal.SIGUSR1)
        ...     asked_by()
        'SIGUSR1'
        >>> asked_by() is None
        True
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, _remember)
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            if signal.getsignal(number) is _remember:
                signal.signal(number, handler)


def asked_by() -> str | None:
    """Name the first signal that asked; None if none did."""
    return signal.Signals(_asked[0]).name if _asked else None


def turn_deaf() -> None:
    """Ignore the signals for good: this process has saved and is about to end by itself.

    A launcher that sees the first rank leave tells the others to; they must end with their own
    exit code all the same.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
