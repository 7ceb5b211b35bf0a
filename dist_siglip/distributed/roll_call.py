"""Who is missing, asked after a collective has failed, so that it costs nothing before."""

import time

from torch.distributed import ProcessGroup

# How long a rank whose call failed waits for others to say that theirs failed too.
_SECONDS = 1.0


def name_missing(group: ProcessGroup, occasion: str) -> str:
    """Write which ranks of ``group`` do not report the same failure within a second.

    Every rank whose call failed leaves a note in the group's store and looks for the notes of
    the others.

    Args:
        group: process group whose ranks were waited for; its store is asked, not the group.
        occasion: what failed, the same on every rank and never the same twice.

    Returns:
        The subject and verb of a sentence: who did not take part.
    """
    missing: list[int] = []
    key = f"dist_siglip/{occasion}/rank-"
    try:
        store = group.get_group_store()
        store.set(f"{key}{group.rank()}", "here")
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            missing = [r for r in range(group.size()) if not store.check([f"{key}{r}"])]
            if not missing:
                break
            time.sleep(0.05)
    except (RuntimeError, AttributeError):
        # The store went down with its rank, or this version of torch keeps it to itself.
        missing = []
    who = f"rank {', '.join(map(str, missing))}" if missing else "a rank"
    return f"{who} did not take part: it ended, raised, or makes another call; look at its log"
