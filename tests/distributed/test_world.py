"""The world is read from torch, torchrun or srun, in that order."""

import pytest

from dist_siglip.distributed import World
from dist_siglip.errors import UserError
from tests.support.processes import run_ranks


def test_world_of_one_without_a_launcher():
    assert World.detect({}) == World()


def test_torchrun_variables():
    environ = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    world = World.detect(environ)
    assert (world.rank, world.world_size, world.local_rank, world.num_nodes) == (9, 16, 1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_NTASKS_PER_NODE", "4"),
        ("SLURM_STEP_TASKS_PER_NODE", "4(x2)"),
        ("SLURM_STEP_TASKS_PER_NODE", "4,4"),
    ],
)
def test_srun_variables_with_tasks_per_node_of_several_nodes(name, value):
    environ = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", name: value}
    world = World.detect(environ)
    assert (world.rank, world.world_size, world.local_world_size) == (5, 8, 4)


def _detect(rank, world_size):
    return World.detect({})


def test_a_running_process_group_wins():
    assert [world.rank for world in run_ranks(_detect, 2)] == [0, 1]


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(UserError, match=r"rank \(2\) must be in \[0, world_size=2\)"):
        World(rank=2, world_size=2)
