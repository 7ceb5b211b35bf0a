"""How many ranks of a group share a node, and how a user says so.

Taken, in this order, from the call, from ``set_local_world_size`` or ``group_from_mesh``, and
from the launcher (torchrun's LOCAL_WORLD_SIZE, srun's variables). Ranks of a node must follow one
another, as torchrun and ``srun --distribution=block`` number them.
"""

from collections.abc import Sequence
from itertools import groupby
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dist_siglip.distributed.groups import resolve_group
from dist_siglip.distributed.world import World
from dist_siglip.errors import UserError

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


def group_from_mesh(mesh: DeviceMesh) -> ProcessGroup:
    """Return the group of all ranks of a (node, local) mesh, which then knows its nodes.

    Pass the result as ``group``; a mesh over all ranks gives the default group.

    Distributed contract: collective over the ranks of the mesh.

    Args:
        mesh: 2-D, first dimension nodes, second the ranks of a node.

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
    group = default
    if len(ranks) != default.size():
        made = dist.new_group(ranks, use_local_synchronization=True)
        assert isinstance(made, ProcessGroup)  # a member never gets the non-member marker
        group = made
    set_local_world_size(mesh.size(1), group)
    return group
