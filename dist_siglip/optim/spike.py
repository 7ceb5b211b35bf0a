"""Is the norm of a gradient a spike, next to those of the steps before?"""

import torch
from torch import Tensor


class NormHistory:
    """Finite gradient norms of the last steps, on their device.

    A norm is a spike if it is above ``factor`` times the median of those before. Spikes are
    remembered too: a few do not move a median, as they would a mean and a standard deviation, and
    norms that stay high become the new measure after half a window. Nothing is judged until a
    quarter of the window is filled. The host reads nothing.

    Args:
        factor: > 1.
        window: steps remembered, >= 1.

    Example:
        >>> history = NormHistory(factor=4.0, window=4)
        >>> for norm in (1.0, 2.0, 3.0, 100.0):
        ...     is_spike = history.is_spike(torch.tensor(norm))
        ...     history.add(torch.tensor(norm))
        >>> is_spike, history.values
        (tensor(True), tensor([  1.,   2.,   3., 100.]))

    Source:
        Skipping a step by its norm among the last 128: OLMo-core's ``SkipStepOptimizer``, there
        with mean and standard deviation. The norm rather than the loss: in SigLIP's training it
        is what spikes first (Zhai et al. 2023, arXiv:2303.15343, Figure 5).
    """

    def __init__(self, factor: float, window: int) -> None:
        self.factor = factor
        self.window = window
        self._values = torch.full((window,), torch.inf)
        self._count = torch.zeros((), dtype=torch.int64)

    @property
    def values(self) -> Tensor:
        """(steps remembered,), float32, oldest first, on the CPU; waits for the device."""
        count = int(self._count)
        if count <= self.window:
            return self._values[:count].cpu()
        return self._values.roll(-(count % self.window)).cpu()

    def restore(self, values: Tensor) -> None:
        """Take over the norms of an earlier history, the newest if they are too many.

        Args:
            values: (steps,), oldest first.
        """
        kept = values[-self.window :].to(self._values)
        self._values.fill_(torch.inf)
        self._values[: len(kept)] = kept
        self._count.fill_(len(kept))

    def is_spike(self, norm: Tensor) -> Tensor:
        """Judge a norm.

        Args:
            norm: ().

        Returns:
            (), bool.
        """
        self._move(norm.device)
        known = self._count.clamp(max=self.window)
        middle = ((known - 1) // 2).clamp(min=0)
        # What is not filled yet is infinite, and sorts behind.
        median = self._values.sort().values.gather(0, middle.view(1)).squeeze(0)
        enough = known >= max(1, self.window // 4)
        return enough & (norm.float() > self.factor * median)

    def add(self, norm: Tensor) -> None:
        """Remember the norm of a step, if it is finite.

        Args:
            norm: ().
        """
        self._move(norm.device)
        is_kept = norm.isfinite()
        place = self._count.remainder(self.window).view(1)
        old = self._values.gather(0, place)
        new = torch.where(is_kept, norm.float().view(1), old)
        self._values.scatter_(0, place, new)
        self._count += is_kept

    def _move(self, device: torch.device) -> None:
        self._values, self._count = self._values.to(device), self._count.to(device)
