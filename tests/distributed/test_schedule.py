"""Schedules are arithmetic: every pair meets once, every send is received, accumulators get home.

The walk below moves plain Python values from rank to rank as the schedule says and nothing else.
"""

from collections import Counter

import pytest

from dist_siglip.distributed.ring_schedule import Hop, RingPath, ring_paths
from dist_siglip.errors import UserError

CASES = [
    *[("ring", size) for size in range(1, 9)],
    *[("two_way", size) for size in range(1, 9)],
]


def all_paths(exchange, world_size):
    return [ring_paths(exchange, rank, world_size) for rank in range(world_size)]


def walk(by_rank):
    """Carry shards and accumulators; return the visits and what arrived home.

    A shard is its owner's rank, an accumulator the list of (row rank, shard owner) it met.
    """
    visits, home = [], [[] for _ in by_rank]
    for path_index in range(len(by_rank[0])):
        paths = [paths[path_index] for paths in by_rank]
        last = len(paths[0].hops) - 1
        shards, accumulators = list(range(len(paths))), [[] for _ in paths]
        for step in range(last + 1):
            sent = {}
            for rank, path in enumerate(paths):
                assert path.hops[step].owner == shards[rank]
                if step >= path.first_visit:
                    visits.append((rank, shards[rank]))
                    accumulators[rank].append((rank, shards[rank]))
                message = (shards[rank], accumulators[rank])
                assert sent.setdefault(path.hops[step].goes_to, (rank, message))[0] == rank
            if step < last:
                for rank, path in enumerate(paths):
                    sender, (shards[rank], accumulators[rank]) = sent.pop(rank)
                    assert sender == path.hops[step + 1].came_from
            else:
                for rank, path in enumerate(paths):
                    sender, (owner, finished) = sent.pop(rank)
                    assert (sender, owner) == (path.home_from, rank)
                    home[rank] += finished
            assert not sent
    return visits, home


@pytest.mark.parametrize(("exchange", "world_size"), CASES)
def test_each_pair_meets_once_and_accumulators_come_home(exchange, world_size):
    visits, home = walk(all_paths(exchange, world_size))
    ranks = range(world_size)
    assert Counter(visits) == Counter((row, owner) for row in ranks for owner in ranks)
    for rank, finished in enumerate(home):
        assert sorted(finished) == [(row, rank) for row in ranks]


@pytest.mark.parametrize(("exchange", "world_size"), CASES)
def test_the_own_shard_comes_first_and_nobody_sends_to_itself(exchange, world_size):
    for rank, paths in enumerate(all_paths(exchange, world_size)):
        assert [path.visits_own for path in paths] == [True, False][: len(paths)]
        for path in paths:
            assert path.hops[0].owner == rank
            if world_size > 1:
                assert all(hop.goes_to != rank for hop in path.hops)


def test_the_walk_rejects_a_broken_schedule():
    by_rank = all_paths("ring", 4)
    ((hops, visits_own, home_from),) = by_rank[1]
    broken = (hops[0], Hop(hops[1].owner, hops[1].came_from, 3), *hops[2:])
    by_rank[1] = (RingPath(broken, visits_own, home_from),)
    with pytest.raises((AssertionError, KeyError)):
        walk(by_rank)


@pytest.mark.parametrize("world_size", range(1, 9))
def test_two_way_takes_half_the_steps(world_size):
    paths = ring_paths("two_way", 0, world_size)
    assert max(len(path.hops) for path in paths) == world_size // 2 + 1
    assert sum(len(path.hops) - path.first_visit for path in paths) == world_size
    assert len(paths) == (2 if world_size > 2 else 1)


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="must be one of ring, two_way"):
        ring_paths("three_way", 0, 6)
