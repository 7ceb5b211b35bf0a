"""Check of a step on the device, with the same result on every rank and without waiting.

A loss that is not finite on one rank makes all gradients of that rank so; the reduction of the
gradients carries that to every rank; so the norm of the reduced gradient says whether any loss or
gradient was not finite. A skipped step leaves parameters, moments and step counts as they are, to
the bit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from dist_siglip.distributed import max_over_ranks


def carry_not_finite(loss: Tensor) -> Tensor:
    """Return the loss such that, if it is not finite, none of its gradients is.

    loss * (1 + 0 * constant), the constant being the loss: 1 is multiplied with where it is
    finite, so value and gradients are the same to the bit; nan where it is not. An infinite loss
    can have finite gradients (softplus does), which a reduction over ranks would not tell.

    Args:
        loss: ().

    Example:
        >>> for start in (1.0, torch.inf):
        ...     x = torch.tensor(start, requires_grad=True)
        ...     carry_not_finite(3 * x).backward()
        ...     x.grad
        tensor(3.)
        tensor(nan)
    """
    return loss * (1 + 0 * loss.detach())


def skip_where(optimizer: Optimizer, is_skipped: Tensor) -> None:
    """Make the next step of an optimizer do nothing if a flag on the device says so.

    Fused Adam and AdamW read the flag on the device, and the host waits for nothing. Every other
    optimizer has its gradients taken away, which it must pass over like parameters without one,
    as those of torch do; the host then waits for the flag, once a step.

    Args:
        optimizer: about to be stepped, gradients in place.
        is_skipped: (), bool.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.full((2,), torch.nan)
        >>> optimizer = torch.optim.AdamW([weight], fused=True)
        >>> skip_where(optimizer, torch.tensor(True))
        >>> optimizer.step()
        >>> weight.data, optimizer.state[weight]["step"]
        (tensor([1., 1.]), tensor(0.))

    Source:
        torch's fused kernels read ``found_inf`` for ``torch.amp.GradScaler``. Fused SGD would
        leave its momentum unset where its first step is skipped, so Adam and AdamW alone use it.
    """
    if isinstance(optimizer, Adam) and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = is_skipped.float()  # type: ignore[attr-defined]  # read by its step
    elif is_skipped.item():
        optimizer.zero_grad(set_to_none=True)


def restore_where(is_skipped: Tensor, values: list[Tensor], before: list[Tensor]) -> None:
    """Put values back to what they were, in place, if a flag on the device says so.

    Args:
        is_skipped: (), bool.
        values: such as the running statistics of BatchNorm, which a forward pass has moved.
        before: copies, in the same order.

    Example:
        >>> value = torch.tensor([torch.nan])
        >>> restore_where(torch.tensor(True), [value], [torch.tensor([1.0])])
        >>> value
        tensor([1.])
    """
    for value, old in zip(values, before, strict=True):
        value.copy_(torch.where(is_skipped, old, value))


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


@dataclass(frozen=True)
class StepFinding:
    """What is known about a step, on the device.

    Attributes:
        is_skipped: (), bool, the same on every rank.
        norm: (), of the gradient over all ranks, before clipping.
        loss: (), this rank's share.
        sample_ids: (B,), of this rank's pairs.
        bad_rows: (B,), bool; pairs of this rank with a feature that is not finite.
        scale: what a GradScaler multiplied the loss with; None if there is none.
        terms: (), beside the loss and part of it, by name; means over all ranks.
    """

    is_skipped: Tensor
    norm: Tensor
    loss: Tensor
    sample_ids: Tensor
    bad_rows: Tensor
    scale: float | None
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class StepCheck:
    """Looks at every step between its loss and its optimizer.

    Skipped are steps whose loss or gradient is not finite on any rank, and, if a history is given,
    whose gradient norm is a spike.

    Distributed contract: every rank calls the methods in every step. No collective; with a
    history, one all-reduce of one number on the device, so that ranks agree even where their
    devices round differently.

    Args:
        history: judges norms; None takes every finite one.
        scaler: of float16 gradients, which looks at them itself.
    """

    def __init__(
        self, history: NormHistory | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self.history = history
        self._scaler = scaler
        self._loss = self._sample_ids = self._bad_rows = torch.empty(0)
        self._finding: StepFinding | None = None
        self._terms: Mapping[str, Tensor] = {}
        self._kept: list[Tensor] = []
        self._before: list[Tensor] = []

    def keep(self, values: Iterable[Tensor]) -> None:
        """Copy what a forward pass is about to change, to put it back if the step is skipped."""
        self._kept = list(values)
        self._before = [value.clone() for value in self._kept]

    def note(self, terms: Mapping[str, Tensor]) -> None:
        """Take note of terms beside the loss of the step under way, (), means over all ranks."""
        self._terms = {name: term.detach() for name, term in terms.items()}

    def look(
        self, loss: Tensor, image_features: Tensor, text_features: Tensor, sample_ids: Tensor
    ) -> Tensor:
        """Take note of a step; return the loss to go back from.

        Args:
            loss: (), this rank's share.
            image_features: (B, D), this rank's.
            text_features: (K * B, D), those of K captions of each pair after one another.
            sample_ids: (B,).

        Returns:
            The same loss; if it is not finite, none of its gradients is.
        """
        self._loss, self._sample_ids = loss.detach(), sample_ids
        self._bad_rows = _bad_rows(image_features.detach(), text_features.detach())
        return carry_not_finite(loss)

    @torch.no_grad()
    def decide(self, optimizer: Optimizer, norm: Tensor) -> Tensor:
        """Let the optimizer's next step be taken or skipped; return which, (), bool.

        Args:
            optimizer: gradients reduced over ranks and in place.
            norm: (), of them, whole, before clipping; not multiplied by a scaler.
        """
        is_skipped = ~norm.isfinite()
        if self.history is not None:
            is_skipped = is_skipped | self.history.is_spike(norm)
            is_skipped = max_over_ranks(is_skipped.float()) > 0
            self.history.add(norm)
        skip_where(optimizer, is_skipped)
        restore_where(is_skipped, self._kept, self._before)
        scale = None if self._scaler is None else self._scaler.get_scale()
        self._finding = StepFinding(
            is_skipped,
            norm.detach(),
            self._loss,
            self._sample_ids,
            self._bad_rows,
            scale,
            self._terms,
        )
        self._terms = {}
        return is_skipped

    def take(self) -> StepFinding | None:
        """Hand over what was found in the last step; None if nothing was decided in it."""
        found, self._finding = self._finding, None
        return found


def _bad_rows(images: Tensor, texts: Tensor) -> Tensor:
    """Pairs of which any row is not finite: its sum is not, (B,), bool."""
    sums = torch.cat([each.sum(dim=1, dtype=torch.float32) for each in (images, texts)])
    return ~sums.view(-1, len(images)).isfinite().all(dim=0)
