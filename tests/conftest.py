"""Fixtures every test shares."""

import os

# One thread per process: the distributed tests start several on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from dist_siglip.distributed import leave_process_groups


@pytest.fixture(autouse=True)
def _clean_process_state():
    """Seed torch, and leave no process group or default dtype behind."""
    torch.manual_seed(0)
    yield
    leave_process_groups()
    torch.set_default_dtype(torch.float32)
