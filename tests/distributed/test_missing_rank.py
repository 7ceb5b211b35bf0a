"""No rank waits forever: a missing rank is an error that says what was waited for, and by whom."""

import re
import time
from datetime import timedelta
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist

from dist_siglip.distributed import AccumulatorSpec, circulate
from tests.support.processes import run_ranks

pytestmark = pytest.mark.faults

LIMIT_SECONDS = 3.0
SPEC = [AccumulatorSpec((), torch.float32)]


def _exchange(group, visit):
    return circulate([torch.ones(2)], visit, accumulators=SPEC, exchange="ring", group=group)


def _fill(owner, shard, contributions):
    contributions[0].fill_(1.0)


def _ends(owner, shard, contributions):
    raise KeyError("this rank fails in the middle of an exchange")


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
    fresh, absent, ending = (dist.new_group(range(world_size), timeout=limit) for _ in range(3))
    for group in (absent, ending):
        _exchange(group, _fill)
    never_began = never_came = ("away", 0.0)
    if rank != 2:
        never_began = _complaint(lambda: _exchange(fresh, _fill))
        never_came = _complaint(lambda: _exchange(absent, _fill))
    dist.barrier()
    left_early = _complaint(lambda: _exchange(ending, _ends if rank == 2 else _fill))
    dist.barrier()
    return {"never began": never_began, "never came": never_came, "left early": left_early}


@lru_cache
def lost():
    return run_ranks(_lose_rank_2, 3, timeout_seconds=60)


# Finite is the promise, not soon: machines are busy.
MOST_SECONDS = 10 * LIMIT_SECONDS


def test_a_rank_that_never_comes_is_named():
    for rank, complaints in enumerate(lost()[:2]):
        message, seconds = complaints["never came"]
        assert message.startswith(f"rank {rank} of 3 waited for all ranks to say what they")
        assert "[float32 (*); accumulators: float32 (); ring, sum] (exchange 2 of" in message
        assert "rank 2 did not take part" in message
        assert seconds < MOST_SECONDS


def test_a_rank_that_misses_the_first_exchange_is_named():
    for rank, complaints in enumerate(lost()[:2]):
        message, seconds = complaints["never began"]
        assert message.startswith(f"rank {rank} of 3 waited for all ranks to connect for their")
        assert "rank 2 did not take part" in message
        assert seconds < MOST_SECONDS


def test_a_rank_that_fails_on_the_way_is_waited_for_by_name():
    (first, _), (second, seconds), (failed, _) = (c["left early"] for c in lost())
    assert "fails in the middle" in failed
    # The shard of rank 2 may still have left it; its accumulators never do.
    waited = r"rank 0 of 3 waited for (accumulators of )?shard 2 from rank 2"
    assert re.match(waited, first), first
    assert second.startswith("rank 1 of 3 waited for")
    assert seconds < MOST_SECONDS
