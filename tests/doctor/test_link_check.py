"""Every exchange is timed and checked; a rank that sums wrongly, and a clock that is off, show."""

import time

import pytest
import torch
import torch.distributed as dist

from dist_siglip.doctor import links
from dist_siglip.doctor.links import measure_exchange, measure_neighbours, measure_sum, read_clocks
from tests.support.processes import run_ranks

EXCHANGES = ("ring", "two_way", "two_level", "node_gather", "all_gather")
AHEAD_SECONDS = 50.0
CPU = torch.device("cpu")


def measure(rank, world_size):
    """Everything, soundly; then the ring again with a rank that adds what it should not."""
    group = dist.group.WORLD

    def exchange(name):
        return measure_exchange(
            name, num_rows=5, embed_dim=3, local_world_size=2, device=CPU, group=group
        )

    sound = {name: exchange(name)._asdict() for name in EXCHANGES}
    neighbours = measure_neighbours(1000, CPU, group)
    sums = measure_sum(CPU, group)
    now = time.time
    if rank == 2:
        time.time = lambda: now() + AHEAD_SECONDS
        right = links.exchange_and_sum
        links.exchange_and_sum = lambda *given: right(given[0] * 2, *given[1:])
    clocks = read_clocks(group)
    broken = exchange("ring")
    return sound, neighbours, sums, [tuple(clock) for clock in clocks], broken.is_right


@pytest.fixture(scope="module")
def measured():
    return run_ranks(measure, 4)


def test_every_exchange_is_right_and_takes_time_on_every_rank(measured):
    for sound, *_ in measured:
        for speed in sound.values():
            assert speed["is_right"]
            assert speed["seconds"] > 0
            assert speed["latency_seconds"] > 0


def test_the_bytes_a_rank_sends_are_those_of_the_schedule(measured):
    shard = 5 * 3 * 4
    sound = measured[0][0]
    assert sound["ring"]["sent_bytes"] == 3 * shard + 4 * shard
    assert sound["all_gather"]["sent_bytes"] == 3 * 2 * shard


def test_a_rank_whose_numbers_are_wrong_is_found(measured):
    assert [broken for *_, broken in measured] == [True, True, False, True]


def test_clocks_are_known_to_milliseconds(measured):
    clocks = measured[0][3]
    assert [others[3] for others in measured[1:]] == [[], [], []]
    for rank, (ahead, uncertainty) in enumerate(clocks):
        assert abs(ahead - AHEAD_SECONDS * (rank == 2)) <= uncertainty + 0.01
        assert uncertainty < 1.0


def test_neighbours_and_sums_are_timed(measured):
    for _, neighbours, (seconds, is_right), *_ in measured:
        assert neighbours > 0
        assert seconds > 0
        assert is_right
