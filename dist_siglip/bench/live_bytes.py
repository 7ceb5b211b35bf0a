"""Counts the bytes of living tensors, where no allocator does (a CPU has none that tells)."""

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside the block made and that still live.

    Exact for tensors: every storage counts once, however many views it has, from the operation
    that made it until it is freed. Tensors from before the block and a kernel's own scratch
    memory do not count.

    Attributes:
        live: bytes now.
        peak: largest ``live`` so far.

    Example:
        >>> import torch
        >>> with LiveBytes() as counter:
        ...     first = torch.zeros(100)
        ...     total = (first + 1).sum()
        >>> counter.peak - counter.live, counter.live
        (400, 404)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: Any = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it made."""
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._known.setdefault(given.untyped_storage(), 0)
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.live -= size
