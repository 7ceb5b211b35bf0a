"""Ranks that were started differently, or not at all, are named by every rank, soon."""

import time
from datetime import timedelta
from functools import lru_cache

from dist_siglip.errors import UserError
from dist_siglip.health.start_check import check_ranks_started_alike, describe_differences
from tests.support.processes import run_ranks


def _start(facts, **options):
    started = time.monotonic()
    try:
        check_ranks_started_alike(facts, **options)
    except (UserError, RuntimeError) as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "fine", "", time.monotonic() - started


def _start_in_many_ways(rank, world_size):
    same = {"trainer.max_steps": "10", "torch": "2.15"}
    results = {"equal": _start(same), "again": _start(same)}
    results["one"] = _start({**same, "trainer.max_steps": "20" if rank == 2 else "10"})
    results["extra"] = _start({**same, **({"data.seed": "1"} if rank == 0 else {})})
    if rank != 1:  # the last: rank 1 is an occasion behind from here on
        results["missing"] = _start(same, limit=timedelta(seconds=1))
    return results


@lru_cache
def started():
    return run_ranks(_start_in_many_ways, 3)


def test_ranks_that_were_started_alike_go_on():
    assert {r[way][0] for r in started() for way in ("equal", "again")} == {"fine"}


def test_every_rank_names_the_setting_both_values_and_the_ranks():
    for results in started():
        kind, message, seconds = results["one"]
        assert kind == "UserError"
        assert "trainer.max_steps is 20 on rank 2 and 10 on rank 0-1" in message
        assert seconds < 60  # of the minutes that they may wait for one that is missing


def test_a_fact_that_only_one_rank_has_is_a_difference():
    for results in started():
        assert "data.seed is missing on rank 1-2 and 1 on rank 0" in results["extra"][1] or (
            "data.seed is 1 on rank 0 and missing on rank 1-2" in results["extra"][1]
        )


def test_a_rank_that_never_says_how_it_was_started_is_named():
    for results in (started()[0], started()[2]):
        kind, message, seconds = results["missing"]
        assert kind == "RuntimeError"
        assert "rank 1 of 3 did not say within 1 s" in message
        assert seconds < 10


def test_of_many_differences_the_odd_ranks_are_named_against_the_majority():
    everyone = [{"commit": "a"}] * 3 + [{"commit": "b"}, {"commit": "c"}] + [{"commit": "a"}]
    assert describe_differences(everyone) == [
        "commit is b on rank 3 and a on rank 0-2, 5",
        "commit is c on rank 4 and a on rank 0-2, 5",
    ]


def test_long_values_are_cut():
    (line,) = describe_differences([{"x": "a" * 500}, {"x": "b" * 500}])
    assert len(line) < 250


def test_one_process_has_nothing_to_compare():
    check_ranks_started_alike({"seed": "1"})
