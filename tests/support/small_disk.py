"""A disk that is full for a forked process: files grow to a size, then writes are cut and fail.

The limit holds for every thread of a process, so it is never set in that of the tests: a writer
that one test leaves there would fail in another.
"""

import multiprocessing
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.hostile import in_child


def on_small_disk(num_bytes: int, work: Callable[[], Any]) -> Any:
    """Call ``work`` in a forked process where no file grows beyond ``num_bytes``.

    Returns:
        What it returns; what it raises is raised as ``ChildError`` with its traceback.
    """

    def enter() -> Any:
        with room_for(num_bytes):
            return work()

    return in_child(enter)


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Let no file of this process, a forked one, grow beyond ``num_bytes`` inside the block."""
    assert multiprocessing.parent_process() is not None, "use on_small_disk or in_child"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def make_room() -> None:
    """End the shortage inside the block."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
