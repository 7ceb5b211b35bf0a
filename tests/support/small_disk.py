"""A disk that is full for this process: files grow to a size, then writes are cut and fail."""

import resource
from contextlib import contextmanager


@contextmanager
def room_for(num_bytes: int):
    """Let no file of this process grow beyond ``num_bytes`` inside the block."""
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
