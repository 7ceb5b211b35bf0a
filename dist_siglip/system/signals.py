"""Signals that ask this process to stop, remembered until the ranks can answer them together.

A cluster sends SIGUSR1 or SIGUSR2 some minutes ahead and SIGTERM at the end, a closed terminal
SIGHUP, Ctrl-C SIGINT. The handler only remembers it: saving inside a handler deadlocks when another
rank is in the middle of an exchange, so the ranks agree between two steps. Where there is nothing
to save, Ctrl-C ends at once, and so does a second one: a thread listens for it while the main one
may wait for a lost rank.

Imports nothing heavy: a signal during the seconds of importing torch must not end the process.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
EXIT_INTERRUPTED = 130

# Ignored by nohup, or by a shell for a command in the background: left so.
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
# torchrun hands a Ctrl-C on to ranks that the terminal has sent it to as well.
_SAME_PRESS_SECONDS = 1.0
_WHERE_SECONDS = 1.0

_asked: list[int] = []
_terminals: list[int] = []


class _Run:
    """What there is to say and to do at an interrupt."""

    where: Callable[[], str] | None = None
    end_children: Callable[[], None] | None = None
    saves = False


def _remember(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
    if number == signal.SIGHUP:
        _leave_terminal()
    if number == signal.SIGINT and not _Run.saves:
        raise KeyboardInterrupt


@contextmanager
def listening() -> Iterator[None]:
    """Remember the signals inside the block; afterwards none is remembered.

    Outside the main thread, where Python takes no signals, it does nothing.

    Example:
        >>> with listening():
        ...     signal.raise_signal(signal.SIGUSR1)
        ...     received()
        'SIGUSR1'
        >>> received() is None
        True
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ignored = {n for n in _MAY_BE_IGNORED if before[n] is signal.SIG_IGN}
    _terminals[:] = [number for number in (1, 2) if os.isatty(number)]
    for number in before.keys() - ignored:
        signal.signal(number, _remember)
    try:
        with _second_ctrl_c():
            yield
    finally:
        end_saving()
        _Run.where = _Run.end_children = None
        _asked.clear()
        for number, handler in before.items():
            if signal.getsignal(number) is _remember:
                signal.signal(number, handler)


@contextmanager
def _second_ctrl_c() -> Iterator[None]:
    """Hear a second Ctrl-C in a thread."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reading,), name="stop-listener", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _listen(reading: int) -> None:
    """Answer each Ctrl-C until the other end of the pipe is closed."""
    presses, last = 0, 0.0
    while numbers := os.read(reading, 64):
        for _ in range(numbers.count(signal.SIGINT)):
            now = time.monotonic()
            is_same = now - last < _SAME_PRESS_SECONDS and "TORCHELASTIC_RUN_ID" in os.environ
            if presses and is_same:
                continue
            presses, last = presses + 1, now
            if presses > 1:
                _end_at_once()
            elif _Run.saves:
                logger.info("Ctrl-C: saving at the next step all ranks agree on; again: end now")
    os.close(reading)


def _end_at_once() -> None:
    said: list[str] = []
    teller = threading.Thread(target=lambda: said.append(where()), daemon=True)
    teller.start()
    teller.join(_WHERE_SECONDS)  # a file system may hang as well
    if is_first():
        with suppress(OSError):
            os.write(2, f"dist-siglip: interrupted{''.join(said)}\n".encode())
    if _Run.end_children is not None:
        _Run.end_children()
    os._exit(EXIT_INTERRUPTED)


def _leave_terminal() -> None:
    """Send to nowhere what would go to a terminal that is gone: writing to it fails."""
    gone = [number for number in _terminals if not os.isatty(number)]
    if gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in gone:
            os.dup2(nowhere, number)
        os.close(nowhere)


def describe_with(where: Callable[[], str], end_children: Callable[[], None]) -> None:
    """Say what an interrupt tells, and does: where the run is, as `` at step 7 ...``; its ranks."""
    _Run.where, _Run.end_children = where, end_children


def where() -> str:
    """Return where the run is, as the end of a sentence; empty if there is none."""
    return "" if _Run.where is None else _Run.where()


def begin_saving() -> None:
    """From now on a first Ctrl-C waits, as other signals do, for the ranks to save."""
    _Run.saves = True


def end_saving() -> None:
    """From now on Ctrl-C ends at once."""
    _Run.saves = False


def received() -> str | None:
    """Name the first signal that asked; None if none did."""
    return signal.Signals(_asked[0]).name if _asked else None


def is_interrupted() -> bool:
    """Whether Ctrl-C asked, and nothing else did."""
    return bool(_asked) and all(number == signal.SIGINT for number in _asked)


def is_first(environ: dict[str, str] | None = None) -> bool:
    """Whether this process speaks for all: it has no rank, or the first."""
    return (rank_of_launcher(environ) or "0") == "0"


def rank_of_launcher(environ: dict[str, str] | None = None) -> str | None:
    """Return what a launcher calls this process, without importing torch; None without one.

    Example:
        >>> rank_of_launcher({"LOCAL_RANK": "1"}), rank_of_launcher({})
        ('1', None)
    """
    found = os.environ if environ is None else environ
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((found[name] for name in names if found.get(name)), None)


def ignore() -> None:
    """Ignore the signals for good: this process has saved and is about to end by itself.

    A launcher that sees the first rank leave tells the others to; they must end with their own
    exit code all the same.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forget_pipe() -> None:
    """Keep a forked process from writing its signals into the pipe of its parent."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_pipe)
