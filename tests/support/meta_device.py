"""A device that is not the CPU on any machine: tensors on it have no values.

Whatever reads one, or copies it to the host, fails at once.
"""

import traceback
from contextlib import nullcontext

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from dist_siglip.training.optim import step_check


class _AnyDevice(CPUAccelerator):
    def setup_device(self, device):
        """Accept what is no CPU."""


class MetaStrategy(SingleDeviceStrategy):
    """Trains on it."""

    def __init__(self):
        super().__init__(device=torch.device("meta"), accelerator=_AnyDevice())

    def reduce(self, tensor, *_, **__):
        """Answer Lightning's question for the length of the loader, which it reads."""
        return torch.ones(())

    def teardown(self):
        """Leave the module where it is: it could not come back."""


def imitate_cuda(monkeypatch):
    """Let the device take what CUDA takes: autocast (which is off), and AdamW's flag of a step.

    Terms of the loss that are translated for a device are left as they are.
    """
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *args, **kwargs: (
            nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)
        ),
    )
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind=None: kind != "meta" and is_enabled(kind)
    )
    monkeypatch.setattr(step_check, "skip_where", lambda optimizer, is_skipped: None)


class Uploads(TorchDispatchMode):
    """Copies from the host to the device in the block.

    Attributes:
        found: names of the functions that asked.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        from_host = any(isinstance(a, torch.Tensor) and a.device.type == "cpu" for a in args)
        is_there = isinstance(result, torch.Tensor) and result.device.type == "meta"
        if from_host and is_there and "copy" in function.name():
            frames = (f for f in traceback.extract_stack() if "/torch/" not in f.filename)
            names = [f.name for f in frames if f.name != "__torch_dispatch__"]
            self.found.append(names[-1])
        return result
