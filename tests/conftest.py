"""Fixtures every test shares."""

import atexit
import os
import shutil
import tempfile

# One thread per process: the distributed tests start several on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tables and side-cars of test shards go to a cache folder of their own; the fonts of matplotlib,
# which take seconds to find, stay where they are.
os.environ.setdefault("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dist_siglip-cache-")

import pytest
import torch

from dist_siglip.distributed import leave_process_groups

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _clean_process_state():
    """Seed torch, and leave no process group or default dtype behind."""
    torch.manual_seed(0)
    yield
    leave_process_groups()
    torch.set_default_dtype(torch.float32)
