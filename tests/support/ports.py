"""Ports for ranks to meet at, which no other test has and no outgoing connection is given."""

import itertools
import os

_PORTS_OF_A_WORKER = 4000
_numbers = itertools.count(os.getpid() * 61 % _PORTS_OF_A_WORKER)  # far from a test run beside


def next_port() -> int:
    """Return a port below the range from which Linux serves connections, another at each call."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return 11000 + worker % 5 * _PORTS_OF_A_WORKER + next(_numbers) % _PORTS_OF_A_WORKER
