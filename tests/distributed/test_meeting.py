"""Ranks that meet hear each other, and whoever does not speak is known in bounded time."""

import threading
import time

import pytest
from torch.distributed import HashStore

from dist_siglip.health.rendezvous import Meeting, meet
from tests.support.ports import next_port


@pytest.fixture
def meetings():
    store = HashStore()
    return [Meeting(store, rank, 3) for rank in range(3)]


def test_the_first_hears_all_in_rank_order_and_all_hear_its_answer(meetings):
    for meeting in reversed(meetings):
        meeting.tell("name", {"rank": meeting.rank})
    assert meetings[0].hear_all("name", 5) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    meetings[0].answer("name", [1, None])
    assert [meeting.hear_answer("name", 5) for meeting in meetings] == [[1, None]] * 3


def test_who_does_not_speak_is_none_within_the_limit(meetings):
    for rank in (0, 2):
        meetings[rank].tell("name", rank)
    started = time.monotonic()
    assert meetings[0].hear_all("name", 0.5) == [0, None, 2]
    assert meetings[1].hear_answer("name", 0.5) is None
    assert time.monotonic() - started < 10 * (0.5 + 0.5)


def test_nobody_waits_for_ranks_that_are_known_to_be_absent(meetings):
    for rank in (0, 2):
        meetings[rank].tell("name", rank)
    started = time.monotonic()
    assert meetings[0].hear_all("name", 600, ranks=[0, 2]) == [0, None, 2]
    assert time.monotonic() - started < 300


def test_the_first_leaves_last(meetings):
    left = []
    threads = [
        threading.Thread(target=lambda m=meeting: (m.leave(60), left.append(m.rank)))
        for meeting in meetings
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
        meet(1, 2, address="127.0.0.1", port=next_port(), limit_seconds=1)
    assert time.monotonic() - started < 10
