"""Which ranks share a node: from the call, from the program, from a mesh or from the launcher."""

import logging
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dist_siglip.distributed import World, group_from_mesh, prepare_exchange, set_local_world_size
from dist_siglip.distributed.world import local_world_size_of
from dist_siglip.errors import UserError
from tests.support.processes import run_ranks


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def _refusal(call, *args, **settings):
    with pytest.raises(UserError) as caught:
        call(*args, **settings)
    return str(caught.value)


def _worlds_of_four(rank, world_size):
    world = dist.group.WORLD
    results = {"no launcher": local_world_size_of(world)}
    for name, launched in {
        "block": World(rank=rank, world_size=4, local_rank=rank % 2, local_world_size=2),
        "cyclic": World(rank=rank, world_size=4, local_rank=rank // 2, local_world_size=2),
    }.items():
        results[name] = local_world_size_of(world, launched)
    pair = dist.new_group([1, 2])
    if rank in (1, 2):
        launched = World(rank=rank, world_size=4, local_rank=rank % 2, local_world_size=2)
        results["pair over two nodes"] = local_world_size_of(pair, launched)

    rows = [torch.empty(17 * 2**20 // 64, 16)]  # 68 MiB if gathered

    def choose(exchange, size):
        return prepare_exchange(rows, exchange=exchange, local_world_size=size)

    handler = _Lines()
    logger = logging.getLogger("dist_siglip.distributed.exchange")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    results["chosen"] = [choose("auto", size).name for size in (2, 4, 3, 1 + (rank > 0))]
    results["reasons"] = handler.lines
    for name, size in {"uneven": 3, "disagree": 2 if rank != 1 else 4, "unknown": 0}.items():
        results[name] = _refusal(choose, "two_level", size)

    results["flat mesh"] = _refusal(group_from_mesh, init_device_mesh("cpu", (4,)))
    crossed = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]))
    results["crossed mesh"] = _refusal(group_from_mesh, crossed)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    results["mesh"] = group_from_mesh(mesh) is world
    results["after mesh"] = (local_world_size_of(world), prepare_exchange(rows).name)
    set_local_world_size(4)
    results["told"] = local_world_size_of(world)
    results["too many"] = _refusal(set_local_world_size, 8)
    return results


@lru_cache
def found():
    return run_ranks(_worlds_of_four, 4)


def test_the_launcher_says_which_ranks_share_a_node():
    for rank, results in enumerate(found()):
        assert results["no launcher"] == 1
        assert results["block"] == 2
        # Ranks dealt to the nodes in turn: some rank sees it, and then nobody assumes nodes.
        assert results["cyclic"] == (2 if rank in (0, 3) else 0)
        if rank in (1, 2):
            assert results["pair over two nodes"] == 1


def test_auto_falls_back_with_the_reason():
    for results in found():
        assert results["chosen"] == ["two_level", "ring", "ring", "ring"]
        starts = [line.split("):")[0] for line in results["reasons"]]
        assert starts == [
            "exchange auto -> two_level (2 nodes of 2 ranks",
            "exchange auto -> ring (one node",
            "exchange auto -> ring (4 ranks are not whole nodes of 3",
            "exchange auto -> ring (rank 0 counts 1 ranks on its node and rank 1 counts 2",
        ]


def test_two_level_refuses_what_is_not_nodes_of_equal_size():
    for results in found():
        assert "4 ranks are not whole nodes of 3" in results["uneven"]
        assert "rank 1 counts 4 ranks on its node and rank 0 counts 2" in results["disagree"]
        assert "do not follow one another" in results["unknown"]
        for name in ("uneven", "disagree", "unknown"):
            assert results[name].startswith("exchange ('two_level') needs nodes of equal size")


def test_a_mesh_of_nodes_gives_a_group_that_knows_them():
    for results in found():
        assert results["mesh"]
        assert results["after mesh"] == (2, "two_level")
        assert results["told"] == 4
        assert "1 dimensions" in results["flat mesh"]
        assert "must ascend row by row" in results["crossed mesh"]
        assert "local_world_size (8) must divide the 4 ranks" in results["too many"]
