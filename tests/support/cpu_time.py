"""A bound on the processor time of tests that every change runs.

Processor time, of the test and of every process it starts, is the same on a busy machine; elapsed
time is not. What is shared does not count: fixtures of a wider scope than the test, and the imports
of the process that forked ranks come from.
"""

import os
import resource
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import pytest

TIERS = ("e2e", "faults", "slurm", "fuzz", "lab", "gpu")
LIMIT_SECONDS = 10.0
_PROCESSES = Path("/proc")


class CpuLimit:
    """A plugin that fails a test without a tier that takes more processor time than it may.

    Args:
        seconds: of processor time, for the call and the fixtures of its own.
    """

    def __init__(self, seconds: float = LIMIT_SECONDS):
        self.seconds = seconds
        self.start = 0.0
        self.shared = 0.0
        self.is_inside_shared = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        self.start, self.shared = cpu_seconds(), 0.0
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function" or self.is_inside_shared:
            return (yield)
        start, self.is_inside_shared = cpu_seconds(), True
        try:
            return (yield)
        finally:
            self.is_inside_shared = False
            self.shared += cpu_seconds() - start

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        result = yield
        taken = cpu_seconds() - self.start - self.shared
        if taken > self.seconds and not any(map(item.get_closest_marker, TIERS)):
            pytest.fail(
                f"{taken:.1f} s of processor time, above {self.seconds:g} s: make the test cheaper,"
                f" or give it one of the markers {', '.join(TIERS)}",
                pytrace=False,
            )
        return result


def cpu_seconds() -> float:
    """Return the processor time so far of this process and of all that come from it."""
    if not (_PROCESSES / "self/stat").exists():
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)
    server = forkserver._forkserver._forkserver_pid
    waiting, seconds = [os.getpid()], 0.0
    while waiting:
        pid = waiting.pop()
        with suppress(OSError):  # it has ended, and counts as a child of its parent's from now on
            own, ended = _times(pid)
            seconds += ended + (0.0 if pid == server else own)
            waiting += _children(pid)
    return seconds


def _times(pid):
    """Return the seconds of a process and of its children that have ended."""
    fields = (_PROCESSES / f"{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, user_ended, system_ended = map(int, fields[11:15])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + system) / tick, (user_ended + system_ended) / tick


def _children(pid):
    lists = (_PROCESSES / f"{pid}/task").glob("*/children")
    return [int(child) for each in lists for child in each.read_text().split()]
