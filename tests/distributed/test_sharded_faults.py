"""Two ranks write a folder and one of them fails at any call: both hear of it, none waits."""

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_siglip.runs.checkpoints.selection import damage_of
from dist_siglip.runs.checkpoints.sharded import read_whole, write_sharded
from tests.support.faults import Disk
from tests.support.processes import run_ranks


def save_with_faults(rank, world_size, folder):
    """Let each rank in turn fail at each of its calls; return what the ranks met."""
    mesh = init_device_mesh("cpu", (world_size,))
    met = []
    for victim in range(world_size):
        for kind in ("EIO", "ENOSPC"):
            number, num_calls = 0, 1
            while number < num_calls:
                number += 1
                path = Path(folder) / f"{victim}-{kind}-{number}.ckpt"
                weight = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
                content = {"state_dict": {"w": weight}, "optimizer_states": []}
                disk = Disk(Path(folder), number if rank == victim else 0, kind)
                reason = None
                with disk.failing():
                    try:
                        write_sharded(content, path)
                    except OSError as error:
                        reason = str(error)
                calls = [0]
                if rank == victim:
                    calls = [len(disk.calls) if reason is None else number + 1]
                torch.distributed.broadcast_object_list(calls, src=victim)
                num_calls = calls[0]
                met.append((victim, kind, number, str(path), reason))
    return met


@pytest.mark.faults
def test_a_failure_of_one_rank_at_any_call_is_heard_of_by_both(tmp_path):
    first, second = run_ranks(save_with_faults, 2, str(tmp_path))
    assert len(first) == len(second)
    failed = 0
    for (victim, _, _, path, reason), (*_, other) in zip(first, second, strict=True):
        assert reason == other
        if reason is None:  # a fault that costs nothing, such as in looking at what is there
            assert damage_of(Path(path)) is None
            assert torch.equal(read_whole(Path(path))["state_dict"]["w"], torch.arange(8.0))
        else:
            failed += 1
            assert f"rank {victim}: " in reason
            assert "No space left on device" in reason or "Input/output error" in reason
    assert {victim for victim, *_, reason in first if reason} == {0, 1}
    assert failed > 100
    assert not list(tmp_path.glob(".*")), "a failed save leaves nothing behind"
