"""How do the processes of a node take turns?

By locks that belong to one process (``process_lock``). A thread that works ahead of training stops
waiting for one as soon as it is told to.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from dist_siglip.data.remote.retries import pause
from dist_siglip.system import process_lock

_MODE = 0o600  # of this user alone, as the copies are


def hold(
    file: str, name: str, patience_seconds: float, progress: Callable[[], object] = lambda: None
) -> AbstractContextManager[None]:
    """Hold the lock of a name while the block runs; see ``process_lock.hold``."""
    return process_lock.hold(file, name, patience_seconds, progress, pause=pause, mode=_MODE)
