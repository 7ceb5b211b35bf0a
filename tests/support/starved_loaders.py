"""What runs in loader processes and brings them to an end, or to their limits."""

import itertools
import os
import resource
import signal

import torch
from torch.utils.data import get_worker_info

_samples = itertools.count()


def _is_victim():
    return get_worker_info() is not None and os.environ.get("LOCAL_RANK", "1") == "1"


def killed_on_rank_1(samples):
    """The kernel ends a loader process of rank 1 after 30 samples."""
    for sample in samples:
        if _is_victim() and next(_samples) == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        yield sample


def defective(samples):
    """A defect of the user's own."""
    for sample in samples:
        if _is_victim() and next(_samples) == 5:
            raise KeyError("a defect of this stage")
        yield sample


class NoFiles(torch.utils.data.Dataset):
    """Items that a loader process has, but has no file left to hand over in."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 0:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))  # what is open stays open
        return torch.ones(8)
