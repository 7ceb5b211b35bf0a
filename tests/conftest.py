"""Fixtures every test shares."""

import atexit
import gc
import os
import re
import shutil
import signal
import tempfile
import threading
from itertools import zip_longest
from pathlib import Path

# One thread per process: the distributed tests start several on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more would stay for the whole run
# Tables and side-cars of test shards go to a cache folder of their own; the fonts of matplotlib,
# which take seconds to find, stay where they are.
os.environ.setdefault("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dist_siglip-cache-")

import pytest
import torch

from dist_siglip.distributed import leave_process_groups
from tests.support.cpu_time import TIERS, CpuLimit

# A shell that starts the suite in the background leaves it, and all that it starts, deaf to these.
for _number, _usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

_TESTS = Path(__file__).parent
_OF_A_RANK = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR")

# Threads that stay by design; none of them writes to files.
_STAY = re.compile(
    r"shard transfers"  # one for all transfers of a process
    r"|fsspecIO|asyncio_"  # the event loop of fsspec; the pools of loops, for addresses of hosts
    r"|tqdm_monitor"  # of the progress bars of other packages
    r"|process_request_thread"  # a server of a test, until the client lets the connection go
)
_SECONDS_TO_END = 30.0


# Every test of these folders belongs to the tier of their name.
_FOLDER_TIERS = ("slurm", "lab")


def pytest_addoption(parser):
    """All repetitions of what CI does a tenth of."""
    parser.addoption(
        "--full", action="store_true", help="all 50 kills and 26,000 broken inputs, not a tenth"
    )


def pytest_configure(config):
    """Bound the processor time of tests without a tier."""
    config.pluginmanager.register(CpuLimit())


@pytest.fixture(scope="session")
def is_full(pytestconfig):
    """Whether all repetitions are asked for, not a tenth."""
    return pytestconfig.getoption("full")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items):
    """Mark tests by folder; order files with tiers first, so that no long one is left at the end.

    Those of a cluster, which mostly waits, in turns with those that need the processors.
    """
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in _FOLDER_TIERS:
            item.add_marker(folder)
    files = list(dict.fromkeys(item.path for item in items))
    tiered = {item.path for item in items if any(map(item.get_closest_marker, TIERS))}
    clusters = [path for path in files if path.parent.name == "slurm"]
    others = [path for path in files if path in tiered and path not in clusters]
    turns = [path for pair in zip_longest(clusters, others) for path in pair if path is not None]
    order = {path: number for number, path in enumerate(dict.fromkeys([*turns, *files]))}
    items.sort(key=lambda item: order[item.path])


def pytest_runtest_setup(item):
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")


@pytest.fixture(autouse=True)
def _clean_process_state():
    """Seed torch; leave no process group, default dtype or variable of a launcher behind."""
    torch.manual_seed(0)
    before = {name: os.environ.get(name) for name in _OF_A_RANK}
    yield
    leave_process_groups()
    torch.set_default_dtype(torch.float32)
    left = {name for name, value in before.items() if os.environ.get(name) != value}
    for name in left:
        os.environ.pop(name)
    assert not left, f"the test leaves {left} behind, which makes later commands wait for ranks"


_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def _signals_as_before():
    """What a test ignores or handles, the children of a later one would inherit."""
    before = [(number, signal.getsignal(number)) for number in _SIGNALS]
    yield
    for number, handler in before:
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_thread_left():
    """A test that leaves a thread behind fails, rather than another one that it disturbs."""
    before = set(threading.enumerate())
    yield
    left = _threads_since(before)
    if left:
        gc.collect()  # what holds a loader or a writer may itself be garbage
        for thread in left:
            thread.join(_SECONDS_TO_END)
        assert not _threads_since(before), f"the test leaves threads behind: {left}"


def _threads_since(before):
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before and not _STAY.search(thread.name)
    ]
