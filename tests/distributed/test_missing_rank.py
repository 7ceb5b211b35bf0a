"""No rank waits forever: a missing rank is an error that says what was waited for, and by whom."""

import time
from datetime import timedelta
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist

from dist_siglip.distributed import AccumulatorSpec, circulate
from tests.support.processes import run_ranks

LIMIT_SECONDS = 3.0
SPEC = [AccumulatorSpec((), torch.float32)]


def _exchange(group, visit):
    return circulate([torch.ones(2)], visit, accumulators=SPEC, exchange="ring", group=group)


def _fill(owner, shard, contributions):
    contributions[0].fill_(1.0)


def _ends(owner, shard, contributions):
    raise KeyError("this rank fails in the middle of a trip")


def _complaint(call):
    started = time.monotonic()
    try:
        call()
    except (RuntimeError, KeyError) as error:
        return str(error), time.monotonic() - started
    return "no error", 0.0


def _lose_rank_2(rank, world_size):
    """Rank 2 stays away from one group's exchange, and leaves another's half done."""
    limit = timedelta(seconds=LIMIT_SECONDS)
    absent, ending = (dist.new_group(range(world_size), timeout=limit) for _ in range(2))
    for group in (absent, ending):
        _exchange(group, _fill)
    never_came = ("away", 0.0)
    if rank != 2:
        never_came = _complaint(lambda: _exchange(absent, _fill))
    dist.barrier()
    left_early = _complaint(lambda: _exchange(ending, _ends if rank == 2 else _fill))
    dist.barrier()
    return never_came, left_early


@lru_cache
def lost():
    return run_ranks(_lose_rank_2, 3, timeout_seconds=60)


@pytest.mark.distributed
def test_a_rank_that_never_comes_is_named():
    for rank, (never_came, _) in enumerate(lost()):
        message, seconds = never_came
        if rank == 2:
            continue
        assert message.startswith(f"rank {rank} of 3 waited for all ranks to say what they")
        assert "[float32 (*); accumulators: float32 (); ring, sum] (exchange 2 of" in message
        assert "rank 2 did not take part" in message
        # Finite is the promise; the bound leaves room for a busy machine.
        assert seconds < LIMIT_SECONDS + 15


@pytest.mark.distributed
def test_a_rank_that_fails_on_the_way_is_waited_for_by_name():
    (_, (first, _)), (_, (second, seconds)), (_, (failed, _)) = lost()
    assert "fails in the middle" in failed
    # Rank 2 visits its own shard, which left it before; its accumulators never come.
    assert first.startswith("rank 0 of 3 waited for accumulators of shard 2 from rank 2")
    assert "sending accumulators of shard 0 to rank 1" in first
    assert second.startswith("rank 1 of 3 waited for")
    assert seconds < LIMIT_SECONDS + 15
