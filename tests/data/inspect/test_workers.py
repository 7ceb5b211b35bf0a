import os
import signal
import time

import pytest

from dist_siglip.errors import UserError
from dist_siglip.system.process_pool import map_isolated

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def work(item):
    if item == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "exit":
        os._exit(3)
    if item == "hang":
        time.sleep(60)
    if item == "mistake":
        raise UserError("yours")
    return item * 2


def test_every_item_has_its_result_whatever_the_number_of_workers():
    for workers in (1, 3):
        results = {o.item: o.result for o in map_isolated(work, list(range(10)), workers=workers)}
        assert results == {i: 2 * i for i in range(10)}


def test_a_large_result_comes_whole():
    (outcome,) = map_isolated(lambda item: b"x" * item, [5_000_000], workers=1)
    assert len(outcome.result) == 5_000_000


def test_a_crash_or_a_hang_costs_one_item():
    items = ["a", "crash", "b", "exit", "hang", "c"]
    found = {o.item: o for o in map_isolated(work, items, workers=2, limit_seconds=2)}
    assert {i: found[i].result for i in "abc"} == {"a": "aa", "b": "bb", "c": "cc"}
    assert found["crash"].failure == "its process ended with code -9"
    assert found["exit"].failure == "its process ended with code 3"
    assert found["hang"].failure == "took longer than 2 s"


def test_mistakes_of_the_user_come_through():
    with pytest.raises(UserError, match="yours"):
        list(map_isolated(work, ["a", "mistake"], workers=1))
    with pytest.raises(UserError, match=r"workers \(0\) must be at least 1"):
        list(map_isolated(work, ["a"], workers=0))
