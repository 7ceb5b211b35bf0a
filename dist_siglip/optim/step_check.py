"""Should a step be taken? Decided on the device, the same on every rank, and waited for by nobody.

A loss that is not finite on one rank makes all gradients of that rank so; the reduction of the
gradients, which there is anyway, carries that to every rank; so the norm of the reduced gradient,
the same on all of them, says whether any loss or gradient was not finite. No rank asks another.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_siglip.distributed import max_over_ranks
from dist_siglip.optim.skip import carry_not_finite, restore_where, skip_where
from dist_siglip.optim.spike import NormHistory


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
    """

    is_skipped: Tensor
    norm: Tensor
    loss: Tensor
    sample_ids: Tensor
    bad_rows: Tensor
    scale: float | None


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
        self._kept: list[Tensor] = []
        self._before: list[Tensor] = []

    def keep(self, values: Iterable[Tensor]) -> None:
        """Copy what a forward pass is about to change, to put it back if the step is skipped."""
        self._kept = list(values)
        self._before = [value.clone() for value in self._kept]

    def look(
        self, loss: Tensor, image_features: Tensor, text_features: Tensor, sample_ids: Tensor
    ) -> Tensor:
        """Take note of a step; return the loss to go back from.

        Args:
            loss: (), this rank's share.
            image_features: (B, D), this rank's.
            text_features: (B, D).
            sample_ids: (B,).

        Returns:
            The same loss; if it is not finite, none of its gradients is.
        """
        self._loss, self._sample_ids = loss.detach(), sample_ids
        self._bad_rows = _bad_rows(image_features.detach(), text_features.detach())
        return carry_not_finite(loss)

    @torch.no_grad()
    def decide(self, optimizer: Optimizer, norm: Tensor) -> None:
        """Let the optimizer's next step be taken or skipped.

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
            is_skipped, norm.detach(), self._loss, self._sample_ids, self._bad_rows, scale
        )

    def take(self) -> StepFinding | None:
        """Hand over what was found in the last step; None if nothing was decided in it."""
        found, self._finding = self._finding, None
        return found


def _bad_rows(*features: Tensor) -> Tensor:
    """Rows in which any of the (B, D) tensors is not finite: their sums are not, (B,), bool."""
    sums = torch.stack([each.sum(dim=1, dtype=torch.float32) for each in features])
    return ~sums.isfinite().all(dim=0)
