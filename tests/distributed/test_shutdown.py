import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_siglip.distributed import leave_process_groups
from tests.support.processes import run_ranks

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="thread names are read from /proc"),
]


def _gloo_threads():
    names = [Path(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name.read_text() for name in names)


def _count_threads(rank, world_size):
    dist.all_reduce(torch.ones(1))
    # What a caught exception does: a cycle that holds the group.
    cycle = [dist.group.WORLD]
    cycle.append(cycle)
    del cycle
    counts = [_gloo_threads()]
    leave_process_groups()
    counts.append(_gloo_threads())
    return counts


def test_no_thread_of_a_group_is_left_even_if_garbage_holds_the_group():
    for before, after in run_ranks(_count_threads, 2):
        assert before > 0
        assert after == 0


def test_leaving_without_a_group_does_nothing():
    leave_process_groups()
    assert not dist.is_initialized()
