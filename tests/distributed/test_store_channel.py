"""Ranks of a channel hear each other, and whoever does not speak is known in bounded time."""

import threading
import time

import pytest
from torch.distributed import HashStore

from dist_siglip.distributed.store_channel import StoreChannel, rendezvous
from tests.support.ports import next_port


@pytest.fixture
def channels():
    store = HashStore()
    return [StoreChannel(store, rank, 3) for rank in range(3)]


def test_the_first_hears_all_in_rank_order_and_all_hear_its_answer(channels):
    for channel in reversed(channels):
        channel.publish("name", {"rank": channel.rank})
    assert channels[0].gather("name", 5) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert channels[1].receive_now("name") is None
    channels[0].broadcast("name", [1, None])
    assert channels[1].receive_now("name") == [1, None]
    assert [channel.receive("name", 5) for channel in channels] == [[1, None]] * 3


def test_who_does_not_speak_is_none_within_the_limit(channels):
    for rank in (0, 2):
        channels[rank].publish("name", rank)
    started = time.monotonic()
    assert channels[0].gather("name", 0.5) == [0, None, 2]
    assert channels[1].receive("name", 0.5) is None
    assert time.monotonic() - started < 10 * (0.5 + 0.5)


def test_nobody_waits_for_ranks_that_are_known_to_be_absent(channels):
    for rank in (0, 2):
        channels[rank].publish("name", rank)
    started = time.monotonic()
    assert channels[0].gather("name", 600, ranks=[0, 2]) == [0, None, 2]
    assert time.monotonic() - started < 300


def test_the_first_leaves_last(channels):
    left = []
    threads = [
        threading.Thread(target=lambda m=channel: (m.leave(60), left.append(m.rank)))
        for channel in channels
    ]
    threads[0].start()
    time.sleep(0.2)
    assert left == []
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(left) == [0, 1, 2]


def test_a_rank_that_finds_nobody_gives_up_within_the_limit():
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        rendezvous(1, 2, address="127.0.0.1", port=next_port(), limit_seconds=1, name="test")
    assert time.monotonic() - started < 10


class CountingStore:
    """A store that counts what is asked of it."""

    def __init__(self):
        self.values, self.requests = {}, 0

    def set(self, key, value):
        self.values[key] = value.encode()

    def check(self, keys):
        self.requests += 1
        return all(key in self.values for key in keys)

    def wait(self, keys, timeout):
        self.requests += 1
        if not all(key in self.values for key in keys):
            raise RuntimeError("Wait timeout")

    def multi_get(self, keys):
        self.requests += 1
        return [self.values[key] for key in keys]


@pytest.mark.parametrize(
    ("missing", "most_requests"), [([], 3), ([0], 28), ([1234], 28), (range(808, 816), 48)]
)
def test_one_of_4096_ranks_is_missed_with_few_requests(missing, most_requests):
    """Not with one for each rank; a node of eight is as quick to name as a rank, nearly."""
    store = CountingStore()
    for rank in set(range(4096)) - set(missing):
        StoreChannel(store, rank, 4096).publish("failed", rank)
    told = StoreChannel(store, 1, 4096).gather("failed", 0.01)
    assert told == [None if rank in missing else rank for rank in range(4096)]
    assert store.requests <= most_requests
