"""Rank and sizes of this process, and the ranks of each node.

``World`` is a plain value: everything that does arithmetic with ranks takes one, so 22 nodes
of 8 ranks can be reasoned about in a single process. ``World.detect`` is the only place that
asks torch and the environment.

The ranks of a node are taken, in this order, from the call, from ``set_local_world_size`` or
``group_from_mesh``, and from the launcher (torchrun's LOCAL_WORLD_SIZE, srun's variables). They
must follow one another, as torchrun and ``srun --distribution=block`` number them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dist_siglip.distributed.groups import exchange_group, resolve_group
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


_told: "WeakKeyDictionary[ProcessGroup, int]" = WeakKeyDictionary()


def ranks_per_node(ranks: Sequence[int], local_world_size: int) -> int:
    """Return how many of ``ranks`` each node holds, 0 unless it is the same number on every node.

    Args:
        ranks: global ranks of a group, in group order.
        local_world_size: ranks per node of the whole run.

    Example:
        >>> ranks_per_node(range(8), 4), ranks_per_node([0, 1, 4, 5], 4), ranks_per_node([0, 4], 4)
        (4, 2, 1)
        >>> ranks_per_node(range(6), 4), ranks_per_node([0, 4, 1, 5], 4)
        (0, 0)
    """
    runs = [(node, len(list(run))) for node, run in groupby(r // local_world_size for r in ranks)]
    sizes = {size for _, size in runs}
    one_run_each = len({node for node, _ in runs}) == len(runs)
    return sizes.pop() if one_run_each and len(sizes) == 1 else 0


def local_world_size_of(group: ProcessGroup, world: World | None = None) -> int:
    """Return the ranks per node of ``group`` as far as this rank knows; 0 if it is not one number.

    Args:
        group: process group this rank belongs to.
        world: this rank's world; detected by default.
    """
    told = _told.get(group)
    if told is not None:
        return told
    world = World.detect() if world is None else world
    if world.rank % world.local_world_size != world.local_rank:
        return 0  # ranks of a node do not follow one another
    return ranks_per_node(dist.get_process_group_ranks(group), world.local_world_size)


def set_local_world_size(local_world_size: int, group: ProcessGroup | None = None) -> None:
    """Say how many consecutive ranks of ``group`` share a node, where the launcher does not.

    Distributed contract: no communication; every rank of the group says the same.

    Args:
        local_world_size: ranks per node; must divide the group's size.
        group: process group; the default group if None.

    Raises:
        UserError: without a process group, or if it does not divide the size of the group.
    """
    group = resolve_group(group)
    if group is None:
        raise UserError(
            f"local_world_size ({local_world_size}) needs a process group; initialise it first"
        )
    if local_world_size < 1 or group.size() % local_world_size:
        raise UserError(
            f"local_world_size ({local_world_size}) must divide the {group.size()} ranks of the "
            "group; leave it out where nodes differ in size"
        )
    _told[group] = local_world_size


def group_from_mesh(mesh: DeviceMesh) -> ProcessGroup | None:
    """Return the group of all ranks of a (node, local) mesh, which then knows its nodes.

    Pass the result as ``group``; a mesh over all ranks gives the default group.

    Distributed contract: that of ``exchange_group``.

    Args:
        mesh: 2-D, first dimension nodes, second the ranks of a node.

    Returns:
        The group; None on ranks outside of the mesh.

    Raises:
        UserError: if the mesh is not 2-D or its ranks do not ascend row by row (torch sorts the
            ranks of a group).
    """
    if mesh.ndim != 2:
        raise UserError(f"mesh has {mesh.ndim} dimensions; give (node, local), two of them")
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise UserError(
            f"ranks of the mesh ({mesh.mesh.tolist()}) must ascend row by row: one row per node"
        )
    default = dist.group.WORLD
    assert default is not None  # a mesh exists only with a process group
    group = default if len(ranks) == default.size() else exchange_group(ranks)
    if group is not None:
        set_local_world_size(mesh.size(1), group)
    return group
