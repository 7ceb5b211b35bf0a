"""The environment torchrun gives a rank, for Lightning inside a process group that exists."""

import os


def pretend_torchrun(rank: int, world_size: int) -> None:
    """Set the variables of one node; Lightning starts no process of its own then."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # never asked: the process group is there already
    }
