"""Two optimizers that look like one: one for the matrices of blocks, one for all other parameters.

Muon orthogonalises the update of a matrix, which makes sense inside a network and nowhere else:
embeddings, heads, norms, biases and the scale of the logits want another optimizer. A trainer knows
one optimizer with groups, a schedule steps groups, a checkpoint numbers them; so both parts share
the groups and the state of the pair.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class PairedOptimizer(Optimizer):
    """Steps one optimizer, then another; groups and state are those of both, in this order.

    Args:
        inner: for the matrices of blocks.
        outer: for the rest; no parameter is in both.

    Example:
        >>> a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        >>> for parameter in (a, b):
        ...     parameter.grad = torch.ones(2)
        >>> pair = PairedOptimizer(torch.optim.SGD([a], lr=0.5), torch.optim.SGD([b], lr=0.25))
        >>> pair.step()
        >>> a.tolist(), b.tolist(), [group["lr"] for group in pair.param_groups]
        ([0.5, 0.5], [0.75, 0.75], [0.5, 0.25])
    """

    def __init__(self, inner: Optimizer, outer: Optimizer) -> None:
        self.parts = (inner, outer)
        self._num_inner = len(inner.param_groups)
        super().__init__([*inner.param_groups, *outer.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both; the closure, which computes the gradients, is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a loaded state, and let both parts have it."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        inner, outer = self.parts
        inner.param_groups = self.param_groups[: self._num_inner]
        outer.param_groups = self.param_groups[self._num_inner :]
        inner.state = outer.state = self.state
