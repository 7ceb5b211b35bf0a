"""A device that is not the CPU on any machine: tensors on it have no values."""

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy


class _AnyDevice(CPUAccelerator):
    def setup_device(self, device):
        """Accept what is no CPU."""


class MetaStrategy(SingleDeviceStrategy):
    """Trains where there is nothing to read: what copies to the host, or reads a value, fails."""

    def __init__(self):
        super().__init__(device=torch.device("meta"), accelerator=_AnyDevice())

    def reduce(self, tensor, *_, **__):
        """Answer Lightning's question for the length of the loader, which it reads."""
        return torch.ones(())

    def teardown(self):
        """Leave the module where it is: it could not come back."""
