"""Handshakes: short where nothing changed, full where anything did, and as cheap at 4,096 ranks."""

import sys
import time
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist

from dist_siglip.distributed import (
    ask_all_ranks,
    circulate,
    gather_rows,
    heard_from_ranks,
    prepare_exchange,
)
from dist_siglip.distributed.groups import Control, control_of, set_companions, transfers_of
from dist_siglip.distributed.handshake import GroupLink, Handshake
from dist_siglip.distributed.simulate import simulated_world
from dist_siglip.errors import UserError
from tests.support.processes import run_ranks


def _rows_seen(rank, num_rows, width=2):
    seen = []
    circulate(
        [torch.full((num_rows, width), float(rank))],
        lambda owner, shard, _: seen.append(shard[0]),
        exchange="ring",
    )
    return sorted(torch.cat(seen)[:, 0].tolist())


def _steps(rank, world_size):
    handshake = control_of(dist.group.WORLD).handshake
    found = {"full": [], "rows": []}
    for num_rows in (2, 2, 2 + rank, 2 + rank, 2, 2, 3 if rank == 1 else 2, 2):
        found["rows"].append(_rows_seen(rank, num_rows))
        found["full"].append(handshake.num_full)
    for odd, shared in ((5, 10.0), (2, 12.0)):
        with pytest.raises(UserError) as caught:
            prepare_exchange(
                [torch.zeros(2, odd if rank == 1 else 2)],
                shared={"scale": shared if rank == 1 else 10.0},
                exchange="ring",
            )
        found[odd] = str(caught.value)
    found["afterwards"] = _rows_seen(rank, 2)
    heard_from_ranks()
    found["nothing said"] = heard_from_ranks()
    found["heard"] = []
    for asked in (0, 3 if rank == 1 else 1, 0):
        ask_all_ranks(asked)
        _rows_seen(rank, 2)
        found["heard"].append(heard_from_ranks())
    return found


@lru_cache
def steps_of(world_size):
    return run_ranks(_steps, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_only_a_change_is_compared_in_full(world_size):
    """Rows change on some ranks, on none, on all but the first, on one."""
    ranks = range(world_size)
    for found in steps_of(world_size):
        assert found["full"] == [1, 1, 2, 2, 3, 3, 4, 5]
        for step, extra in ((0, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 0, 0]), (6, [0, 1, 0])):
            expected = [float(r) for r in ranks for _ in range(2 + extra[r])]
            assert found["rows"][step] == expected


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_differs_is_named_in_a_steady_run_too(world_size):
    for found in steps_of(world_size):
        assert "(*, 5)" in found[5]
        assert "passes [float32 (*, 2)" in found[5]
        assert "scale is 12 on rank 1 and 10 on rank 0" in found[2]
        assert found["afterwards"] == [float(r) for r in range(world_size) for _ in range(2)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_number_rides_along(world_size):
    for found in steps_of(world_size):
        assert found["heard"] == [0, 3, 0]
        assert found["nothing said"] is None


def _one_waits(rank, world_size):
    """Rank 1 calls another exchange; hashes of what was settled before tell them apart."""
    for width in (2, 3):
        _rows_seen(rank, 2, width)
    with pytest.raises(UserError) as caught:
        _rows_seen(rank, 2, 3 if rank == 1 else 2)
    return str(caught.value)


def test_two_settled_exchanges_are_not_taken_for_each_other():
    for message in run_ranks(_one_waits, 2):
        assert "(*, 3)" in message
        assert "(*, 2)" in message


class _Silent:
    """A group of so many ranks, all of which say what this one says."""

    def __init__(self, world_size):
        self.world_size, self.sent = world_size, []

    def rank(self):
        return 0

    def size(self):
        return self.world_size

    def send(self, tensors, target, tag):
        self.sent.append((target, tensors[0].nbytes))
        self.last = tensors[0].clone()
        return self

    def recv(self, tensors, source, tag):
        tensors[0].copy_(self.last)
        return self

    def wait(self):
        return True


def _steady_step(world_size):
    """Messages, Python calls and seconds of one handshake of a steady run."""
    with simulated_world(world_size, local_world_size=8) as group:
        silent = _Silent(world_size)
        link = GroupLink(silent)
        handshake = Handshake(link.maximum, lambda message: [message] * world_size)
        set_companions(group, Control(handshake), transfers_of(group, torch.device("cpu")))
        rows = torch.zeros(4, 8)

        def prepare():
            return prepare_exchange([rows], exchange="auto", shared={"scale": 10.0}, purpose="a")

        for _ in range(2):
            prepare()
        silent.sent.clear()
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            plan = prepare()
        finally:
            sys.setprofile(None)
        assert plan.total_rows == 4 * world_size
        assert handshake.num_full == 1
        sent = list(silent.sent)
        began = time.perf_counter()
        for _ in range(20):
            prepare()
        return sent, calls, (time.perf_counter() - began) / 20


def test_a_steady_step_costs_4096_ranks_twelve_short_messages(record_property):
    few, few_calls, _ = _steady_step(64)
    many, many_calls, seconds = _steady_step(4096)
    record_property("milliseconds of a handshake at W = 4096, without a network", 1e3 * seconds)
    assert [target for target, _ in many] == [2**k for k in range(12)]
    assert len(few) == 6
    assert sum(size for _, size in many) == 12 * 64
    # Nothing else grows with the number of ranks.
    per_message = (many_calls - few_calls) / 6
    assert per_message == int(per_message) <= 20
    assert many_calls < 500


def _reference(values):
    return [max(column) for column in zip(*values, strict=True)]


def _maxima(rank, world_size):
    link = GroupLink(dist.new_group(range(world_size)))
    values = [[float((7 * other + k) % 5) for k in range(4)] for other in range(world_size)]
    found = link.maximum(values[rank], "")
    gather_rows(torch.zeros(1))
    return found, _reference(values)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_largest_of_all_ranks_is_found(world_size):
    for found, expected in run_ranks(_maxima, world_size):
        assert found == expected
