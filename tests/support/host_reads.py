"""Operations for which the host waits for a CUDA device, counted on any device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What reads a value, or makes a tensor whose size depends on values.
_READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::equal",
    "aten::repeat_interleave.Tensor",
}


class HostReads(TorchDispatchMode):
    """Names of the operations of the block that would make the host wait.

    Attributes:
        names: one for each call; of an index by a bool mask "mask".
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name in _READS:
            self.names.append(name)
        if name.startswith(("aten::index.", "aten::index_put", "aten::_index_put")):
            chosen = [each for each in args[1] if isinstance(each, torch.Tensor)]
            if any(each.dtype in (torch.bool, torch.uint8) for each in chosen):
                self.names.append("mask")
        return function(*args, **(kwargs or {}))
