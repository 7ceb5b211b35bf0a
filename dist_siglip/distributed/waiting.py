"""Description of what the main thread does, and whether it waits for other ranks.

Exchanges say what they wait for while they do; for the collectives of torch, DDP and Lightning the
frames of the thread tell.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
# Innermost calls that wait without a frame of the above: DDP's own, and functional collectives.
_WAITING = ("torch/distributed/", "torch/nn/parallel/distributed.py")
_WRITING = "torch/distributed/checkpoint/"
_BACKWARD = "_engine_run_backward"  # where DDP averages gradients
_DEBUGGERS = frozenset({"pdb.py", "bdb.py"})

# What exchanges wait for, the innermost last.
_waits: list[Callable[[], str]] = []


class Doing(NamedTuple):
    """Activity of a thread.

    Attributes:
        what: in words, with the line of code.
        waits: whether it waits for other ranks.
    """

    what: str
    waits: bool


@contextmanager
def waiting_for(describe: Callable[[], str]) -> Iterator[None]:
    """Have a wait for other ranks described while it lasts; costs nothing else."""
    _waits.append(describe)
    try:
        yield
    finally:
        _waits.pop()


def main_thread_doing() -> Doing:
    """Describe what the main thread does, seen from another thread."""
    waits = _waits[-1:]  # the thread goes on meanwhile
    described = waits[0]() if waits else None
    return describe_frames(_main_thread(), described)


def failed_doing(error: BaseException) -> Doing:
    """Describe what an exception came out of."""
    return describe_frames(_inner_first(error.__traceback__))


def describe_frames(frames: list[tuple[str, str, int]], described: str | None = None) -> Doing:
    """Describe what a stack of calls does.

    Args:
        frames: (file, function, line), the innermost first.
        described: what an exchange says it waits for.

    Example:
        >>> loss = ("/a/losses/sigmoid.py", "loss", 7)
        >>> describe_frames([("/t/torch/distributed/distributed_c10d.py", "barrier", 9), loss])
        Doing(what='barrier (sigmoid.py:7)', waits=True)
        >>> describe_frames([loss])
        Doing(what='loss (sigmoid.py:7)', waits=False)
    """
    if not frames:
        return Doing("nothing", waits=False)
    place = _place(frames)
    if described is not None:
        return Doing(f"{described} ({place})", waits=True)
    collective = [function for file, function, _ in frames if file.endswith(_COLLECTIVES)]
    if collective:
        return Doing(f"{collective[-1]} ({place})", waits=True)
    file, function, _ = frames[0]
    if any(part in file for part in _WAITING) and _WRITING not in file:
        return Doing(f"{function} ({place})", waits=True)
    if function == _BACKWARD:
        return Doing(f"the backward pass, where gradients are averaged ({place})", waits=True)
    return Doing(f"{function} ({place})", waits=False)


def is_inside(function: str) -> bool:
    """Whether the main thread is in a call of a function of that name."""
    return any(name == function for _, name, _ in _main_thread())


def is_debugged() -> bool:
    """Whether somebody looks at the main thread with pdb."""
    return any(Path(file).name in _DEBUGGERS for file, _, _ in _main_thread())


def _main_thread() -> list[tuple[str, str, int]]:
    return _outwards(sys._current_frames().get(threading.main_thread().ident or 0))


def _place(frames: list[tuple[str, str, int]]) -> str:
    """File and line of the innermost frame outside torch and Lightning."""
    own = [f for f in frames if not any(f"/{name}/" in f[0] for name in ("torch", "lightning"))]
    file, _, line = (own or frames)[0]
    return f"{Path(file).name}:{line}"


def _outwards(frame: FrameType | None) -> list[tuple[str, str, int]]:
    frames = []
    while frame is not None:
        code = frame.f_code
        frames.append((code.co_filename, code.co_name, frame.f_lineno))
        frame = frame.f_back
    return frames


def _inner_first(traceback: TracebackType | None) -> list[tuple[str, str, int]]:
    frames = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        frames.append((code.co_filename, code.co_name, traceback.tb_lineno))
        traceback = traceback.tb_next
    return frames[::-1]
