import threading
import time

import pytest
import torch
import torch.distributed as dist

from dist_siglip.distributed import circulate, sum_over_ranks
from dist_siglip.distributed.ring import AccumulatorSpec
from dist_siglip.distributed.waiting import describe_frames, main_thread_doing, waiting_for
from tests.support.processes import run_ranks


def test_a_wait_is_described_while_it_lasts():
    with waiting_for(lambda: "shard 2 from rank 1"):
        inside = main_thread_doing()
    assert inside.what.startswith("shard 2 from rank 1 (")
    assert inside.waits
    assert not main_thread_doing().waits


@pytest.mark.parametrize(
    ("innermost", "what", "waits"),
    [
        (("/t/torch/distributed/distributed_c10d.py", "all_reduce", 5), "all_reduce", True),
        (("/t/torch/nn/parallel/distributed.py", "_sync_buffers", 5), "_sync_buffers", True),
        (("/t/torch/autograd/graph.py", "_engine_run_backward", 5), "the backward pass", True),
        (("/t/torch/distributed/checkpoint/filesystem.py", "write", 5), "write", False),
        (("/x/tar.py", "read", 5), "read", False),
    ],
)
def test_frames_tell_collectives_from_work_of_the_rank(innermost, what, waits):
    doing = describe_frames([innermost, ("/x/loss.py", "loss", 7)])
    assert doing.what.startswith(what)
    assert doing.waits == waits


def _watch_exchanges(rank, world_size):
    """Have rank 1 come once rank 0 was seen waiting; return what it was seen to wait for."""
    found = {}
    seen = dist.distributed_c10d._get_default_store()
    for name in ("exchange", "all-reduce"):
        circulate_once() if name == "exchange" else None  # connects
        dist.barrier()
        if rank == 1:
            seen.wait([name])
        else:
            watch = threading.Thread(target=_see_waiting, args=(found, name, seen))
            watch.start()
        circulate_once() if name == "exchange" else sum_over_ranks(torch.ones(1))
    return {name: tuple(doing) for name, doing in found.items()}


def _see_waiting(found, name, seen):
    """Look until the main thread waits in a collective; never, and the test ends at its limit."""
    while not (doing := main_thread_doing()).waits:
        time.sleep(0.01)
    found[name] = doing
    seen.set(name, "waits")


def circulate_once():
    def fill(owner, shard, contributions):
        contributions[0].fill_(1.0)

    spec = [AccumulatorSpec((), torch.float32)]
    circulate([torch.ones(2)], fill, accumulators=spec, exchange="ring")


def test_a_rank_that_waits_names_its_exchange_or_collective():
    first, _ = run_ranks(_watch_exchanges, 2)
    what, waits = first["exchange"]
    assert what.startswith("all ranks to say what they exchange [float32 (*); accumulators")
    assert waits
    what, waits = first["all-reduce"]
    assert what.startswith("all_reduce (collectives.py:")
    assert waits
