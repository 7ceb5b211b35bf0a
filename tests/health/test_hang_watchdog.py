"""A rank that hangs, is stopped, dies or fails: all end, in time, and the line names it.

Every scenario trains three ranks with steps of a batch and a collective; the store is rank 0's. The
limit of a collective is half an hour, and who has not ended after 400 s is killed (code -9).
So whoever ends by itself was ended by the watchdog, or by the connections of a process that is
gone.
"""

import json
import re
import subprocess
from functools import lru_cache

import pytest

from tests.support.command import REPOSITORY, environment
from tests.support.forked_runs import warm_python
from tests.support.ports import next_port

pytestmark = pytest.mark.faults

SCENARIOS = (
    "sleeps",
    "stopped",
    "first stopped",
    "killed",
    "first killed",
    "raises",
    "slow evaluation",
    "suspended",
)
HUNG = 70


@lru_cache
def ended():
    """Exit code, stderr and stacks of every rank, by scenario."""
    ports = [next_port() for _ in SCENARIOS]
    words = [word for pair in zip(map(str, ports), SCENARIOS, strict=True) for word in pair]
    done = subprocess.run(
        [warm_python(), "-m", "tests.support.hang_watchdog_ranks", *words],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
        timeout=800,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_rank_that_sleeps_in_its_data_is_named_and_all_end():
    for code, _, stacks in ended()["sleeps"]:
        assert code == HUNG
        line = stacks.splitlines()[0]
        assert line.startswith("rank 1 is behind: waiting for data, step 3, for ")
        assert "in sleep_in_the_data (hang_watchdog_ranks.py:" in line
        assert "rank 0, 2 waiting in all_reduce (collectives.py:" in line


def test_the_stacks_of_all_threads_are_written_and_those_of_the_stalled_rank_said():
    (_, first, stacks), (_, stalled, _), _ = ended()["sleeps"]
    # On a busy machine its collective had failed before, since the others had ended.
    assert "in all_reduce" in stacks or "in explain" in stacks
    assert "most recent call first" in stacks
    assert "in sleep_in_the_data" in stalled
    assert "Thread 0x" not in first


def test_a_rank_that_is_stopped_is_named_as_the_one_that_does_not_answer():
    first, stopped, last = ended()["stopped"]
    assert stopped[0] == -9  # ended like a launcher does it; the others end by themselves
    for code, said, _ in (first, last):
        assert code == HUNG
        assert "rank 1 does not answer: it was killed, is stopped" in said or said == ""
    assert "rank 0, 2 waiting in all_reduce" in first[1]


def test_all_end_when_the_rank_that_keeps_the_store_is_stopped():
    for code, said, _ in ended()["first stopped"][1:]:
        assert code == HUNG
        assert "hears nothing of the others: rank 0, which keeps their store" in said


def test_a_rank_that_is_killed_is_named_by_one_whose_collective_failed():
    first, _, last = ended()["killed"]
    # On a busy machine another one may answer too late.
    assert re.search(r"explained: .*rank 1 does not answer: it was killed", first[1] + last[1])
    assert [first[0], last[0]] == [1, 1]


def test_all_end_when_the_rank_that_keeps_the_store_is_killed():
    for code, said, _ in ended()["first killed"][1:]:
        assert code in (1, HUNG)
        assert "hears nothing of the others: rank 0, which keeps their store" in said


def test_a_rank_that_fails_tells_the_others_why():
    first, second, failed = ended()["raises"]
    text = "rank 2 failed in waiting for data, step 3: KeyError: 'no such picture'"
    assert text in first[1] + second[1]
    assert "explained: None" in failed[1]  # its own traceback says it
    assert failed[0] == 1
    # The others by their collective, or by the thread if that is slower to fail.
    assert {first[0], second[0]} <= {1, HUNG}


def test_ranks_that_wait_for_a_slow_but_allowed_evaluation_go_on():
    assert [code for code, *_ in ended()["slow evaluation"]] == [0, 0, 0]


def test_a_job_that_was_suspended_for_longer_than_the_limit_goes_on():
    assert [code for code, *_ in ended()["suspended"]] == [0, 0, 0]
