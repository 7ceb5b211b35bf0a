"""Where this process stands among the ranks of a run.

``World`` is a plain value: everything that does arithmetic with ranks takes one, so 22 nodes
of 8 ranks can be reasoned about in a single process. ``World.detect`` is the only place that
asks torch and the environment.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from dist_siglip.errors import UserError

# (rank, world size, local rank, local world size): torchrun's names, then srun's, which says
# SLURM_NTASKS_PER_NODE only if it was asked for so many.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE",)),
    (
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        ("SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank and sizes of this process, as one frozen value.

    Args:
        rank: this process among all, 0 <= rank < world_size.
        world_size: number of processes of the run.
        local_rank: this process among those of its node.
        local_world_size: number of processes on this node.

    Raises:
        UserError: if a rank is not below its size.

    Example:
        >>> world = World(rank=9, world_size=16, local_rank=1, local_world_size=8)
        >>> world.num_nodes, world.is_first
        (2, False)
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank ({self.rank}) must be in [0, world_size={self.world_size})")
        if not 0 <= self.local_rank < self.local_world_size:
            raise UserError(
                f"local_rank ({self.local_rank}) must be in "
                f"[0, local_world_size={self.local_world_size})"
            )

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes what is written once."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Nodes of the run, if every node holds as many ranks as this one."""
        return -(-self.world_size // self.local_world_size)

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> "World":
        """Read the world from torch.distributed if it runs, else from the launcher, else one.

        Args:
            environ: variables to read; the process environment by default.
        """
        environ = os.environ if environ is None else environ
        launched = cls()
        for rank, size, local_rank, local_sizes in _LAUNCHERS:
            if rank in environ and size in environ:
                said = next((environ[name] for name in local_sizes if name in environ), "1")
                # srun writes "4(x2),3" for two nodes of four tasks and one of three.
                per_node = re.split("[(,]", said)[0]
                local = int(environ.get(local_rank, 0))
                launched = cls(
                    rank=int(environ[rank]),
                    world_size=int(environ[size]),
                    local_rank=local,
                    local_world_size=max(int(per_node), local + 1),
                )
                break
        if not (dist.is_available() and dist.is_initialized()):
            return launched
        return cls(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            local_rank=launched.local_rank,
            local_world_size=launched.local_world_size,
        )


def is_first_process(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process will be rank 0, as far as its launcher has said.

    Answers before any process group exists: torchrun and srun give a rank; Lightning's own
    launcher gives a node rank and a local rank.

    Args:
        environ: variables to read; the process environment by default.

    Example:
        >>> is_first_process({}), is_first_process({"LOCAL_RANK": "1"})
        (True, False)
        >>> is_first_process({"RANK": "8", "LOCAL_RANK": "0"})
        False
    """
    environ = os.environ if environ is None else environ
    for name in ("RANK", "SLURM_PROCID"):
        if name in environ:
            return int(environ[name]) == 0
    return all(int(environ.get(name) or 0) == 0 for name in ("NODE_RANK", "LOCAL_RANK"))
