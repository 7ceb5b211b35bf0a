"""Which scale and bias suit similarities as they are, in the run's global batch?

Under a sigmoid loss the best bias depends on the number of negatives (it moves by about -log N),
and a checkpoint trained with a softmax loss has none at all: with its scale of 100 and a bias of 0
each negative of typical CLIP features costs 15, each image 490,000 in a batch of 32,768. Two
numbers repair that, and finding them is a convex problem: a logistic regression on the
similarities of a few thousand pairs, in which each non-pair counts as often as it occurs in a
global batch. ``pair_similarities`` collects them over ranks; here nothing communicates.
"""

import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.losses.scale import LogitScaleBias

logger = logging.getLogger(__name__)

# Published checkpoints end between 100 and 120.
MAX_SCALE = 200.0

_ITERATIONS = 200


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Scale and bias fitted to similarities, and what they change.

    Attributes:
        scale: the fitted multiplier, > 0.
        bias: the fitted number added to every logit.
        loss_before: expected loss of a random global batch with the scale and bias before.
        loss_after: the same with the fitted ones; no other two numbers give less.
    """

    scale: float
    bias: float
    loss_before: float
    loss_after: float

    @property
    def relative_bias(self) -> float:
        """Similarity at which a pair is judged, -bias / scale."""
        return -self.bias / self.scale

    def describe(self) -> str:
        """Write all of it in one line.

        Example:
            >>> Calibration(scale=90, bias=-27, loss_before=5e5, loss_after=4.8).describe()
            'scale 90.00, bias -27.00, relative bias 0.300: expected loss 500000.0 -> 4.800'
        """
        return (
            f"scale {self.scale:.2f}, bias {self.bias:.2f}, relative bias "
            f"{self.relative_bias:.3f}: expected loss {self.loss_before:.1f} -> "
            f"{self.loss_after:.3f}"
        )


class WeightedSimilarities(NamedTuple):
    """Similarities, and how many of each an image meets in a global batch on average.

    Attributes:
        values: (n,) float64.
        weights: (n,) float64, >= 0.
    """

    values: Tensor
    weights: Tensor


def calibrate_scale_bias(
    positives: Tensor | WeightedSimilarities,
    negatives: Tensor | WeightedSimilarities,
    global_batch_size: int,
    *,
    scale_before: float = 10.0,
    bias_before: float = -10.0,
    max_scale: float = MAX_SCALE,
) -> Calibration:
    """Fit scale t and bias b to the expected sigmoid loss of a random batch of N pairs.

        minimise over t, b:  mean_p softplus(-(t * p + b)) + (N - 1) * mean_n softplus(t * n + b)

    with p over the similarities of pairs and n over those of non-pairs. The problem is convex; it
    is solved by Newton's method in float64. The best t is above 0 exactly if the mean p is above
    the mean n. If every p lies above every n, the loss falls forever as t grows: then, and
    wherever the best t is larger, t is ``max_scale`` and b the best one for it, with a warning.

    No communication; equal arguments give equal results on every rank.

    Args:
        positives: similarities of pairs, (P,); or with weights, which replace 1 / P.
        negatives: similarities of non-pairs, (n,); or with weights, which replace (N - 1) / n
            (for instance the values and scaled counts of a histogram).
        global_batch_size: N, pairs of a training batch over all ranks, at least 2.
        scale_before: multiplier for ``loss_before``.
        bias_before: bias for ``loss_before``.
        max_scale: largest scale that is returned.

    Raises:
        UserError: if there are no positives or no negatives, a similarity is not finite, N < 2,
            max_scale is not a number above 0, or no scale above 0 fits.

    Example:
        >>> pairs, others = torch.tensor([0.9, 0.6, 0.3]), torch.tensor([-0.4, 0.0, 0.4, 0.0])
        >>> fitted = calibrate_scale_bias(pairs, others, 256)
        >>> round(fitted.scale, 2), round(fitted.bias, 2), round(fitted.loss_after, 2)
        (24.26, -14.55, 3.15)

    Source:
        The loss is that of Zhai et al. 2023, arXiv:2303.15343, Algorithm 1.
    """
    if global_batch_size < 2:
        raise UserError(f"global_batch_size ({global_batch_size}) must be at least 2 to calibrate")
    if not 0 < max_scale < math.inf:
        raise UserError(f"max_scale ({max_scale}) must be a finite number above 0")
    pair = _weighted(positives, 1.0, "positives")
    other = _weighted(negatives, global_batch_size - 1.0, "negatives")
    pair_mean, other_mean = _mean(pair), _mean(other)
    spread = pair_mean - other_mean
    # At t = 0 and its best b the derivative by t has the sign of -spread.
    if spread <= 0:
        raise UserError(
            f"no scale above 0 fits: the mean similarity of pairs ({pair_mean:.4f}) is not above "
            f"that of non-pairs ({other_mean:.4f}); calibrate a model that was trained on such "
            "data, and start an untrained one at scale 10 and bias -10"
        )
    # Logits are slope * (similarity - other_mean) / spread + level.
    problem = _Problem(pair, other, origin=other_mean, unit=spread)
    best = problem.minimise()
    if best is None or best[0] > max_scale * spread:
        logger.warning(
            "calibration stopped at its largest scale (%g): these pairs are nearly or entirely "
            "separable; take more pairs",
            max_scale,
        )
        best = problem.minimise_level(max_scale * spread)
    scale = float(best[0]) / spread
    before = best.new_tensor([scale_before * spread, bias_before + scale_before * other_mean])
    return Calibration(
        scale=scale,
        bias=float(best[1]) - scale * other_mean,
        loss_before=float(problem.value(before)),
        loss_after=float(problem.value(best)),
    )


@torch.no_grad()
def set_logits(logits: LogitScaleBias, calibration: Calibration) -> None:
    """Overwrite the parameters of ``logits``, in either parameterisation.

    Example:
        >>> logits = LogitScaleBias(bias_parameterization="relative")
        >>> set_logits(logits, Calibration(scale=90, bias=-27, loss_before=0, loss_after=0))
        >>> [round(value.item(), 4) for value in logits()]
        [90.0, -27.0]
    """
    logits.log_scale.fill_(math.log(calibration.scale))
    if logits.bias_parameterization == "relative":
        logits.relative_bias.fill_(calibration.relative_bias)
    else:
        logits.logit_bias.fill_(calibration.bias)


def describe_batch_change(trained: int, now: int) -> str:
    """Say what another global batch means for a trained bias.

    With c times the negatives, a given similarity is c times less likely to be that of a pair,
    and its best logit log c lower.

    Example:
        >>> describe_batch_change(256, 32768)[:72]
        'was trained with a global batch of 256, this run has 32768: the best bia'
    """
    return (
        f"was trained with a global batch of {trained}, this run has {now}: the best bias is about "
        f"{-math.log(now / trained):+.1f} away; run dist-siglip calibrate, or set "
        "model.calibration_pairs"
    )


class _Problem:
    """Sum over similarities of weight * softplus(-label * logit), by (slope, level)."""

    def __init__(
        self, pair: WeightedSimilarities, other: WeightedSimilarities, *, origin: float, unit: float
    ) -> None:
        labels = torch.cat([torch.ones_like(pair.values), -torch.ones_like(other.values)])
        centred = (torch.cat([pair.values, other.values]) - origin) / unit
        # The label's sign is folded into the rows: every term is softplus(row . parameters).
        self.rows = -labels[:, None] * torch.stack([centred, torch.ones_like(centred)], dim=1)
        self.weights = torch.cat([pair.weights, other.weights])
        self.flat_level = math.log(pair.weights.sum() / other.weights.sum())

    def value(self, parameters: Tensor) -> Tensor:
        """Loss at (slope, level)."""
        exponents = self.rows @ parameters
        # softplus without the cut that torch's own makes at 20.
        return self.weights @ torch.logaddexp(exponents, torch.zeros_like(exponents))

    def minimise(self) -> Tensor | None:
        """Damped Newton from the best flat line; None if there is no minimum in sight."""
        parameters = self.rows.new_tensor([0.0, self.flat_level])
        value = self.value(parameters)
        for _ in range(_ITERATIONS):
            probabilities = torch.sigmoid(self.rows @ parameters)
            gradient = self.rows.T @ (self.weights * probabilities)
            curvature = self.weights * probabilities * (1 - probabilities)
            hessian = self.rows.T @ (curvature[:, None] * self.rows)
            step, failed = torch.linalg.solve_ex(hessian, gradient)
            decrement = float(gradient @ step)
            if failed or not math.isfinite(decrement):
                return None  # flat to the last digit: separable
            if decrement <= 1e-14 * float(value):
                return parameters
            share = 1.0
            while (tried := self.value(parameters - share * step)) > (
                value - 0.25 * share * decrement
            ):
                share /= 2
                if share < 1e-10:
                    return parameters  # rounding is all that is left
            parameters, value = parameters - share * step, tried
        return None

    def minimise_level(self, slope: float) -> Tensor:
        """Best level for a given slope, by halving: the derivative grows with the level."""
        reach = slope * float(self.rows[:, 0].abs().max()) + abs(self.flat_level) + 50
        low, high = -reach, reach
        for _ in range(_ITERATIONS):
            level = (low + high) / 2
            exponents = self.rows @ self.rows.new_tensor([slope, level])
            derivative = self.rows[:, 1] @ (self.weights * torch.sigmoid(exponents))
            low, high = (low, level) if derivative > 0 else (level, high)
        return self.rows.new_tensor([slope, (low + high) / 2])


def _weighted(
    given: Tensor | WeightedSimilarities, total: float, name: str
) -> WeightedSimilarities:
    """Bring to float64 on the CPU, with ``total`` spread evenly where no weights are given."""
    values = (given.values if isinstance(given, WeightedSimilarities) else given).detach().flatten()
    values = values.cpu().double()
    if not values.numel():
        raise UserError(f"{name} are empty; give at least one similarity of each kind")
    if not values.isfinite().all():
        raise UserError(f"{name} hold a similarity that is not finite; check the features")
    if not isinstance(given, WeightedSimilarities):
        return WeightedSimilarities(values, torch.full_like(values, total / values.numel()))
    return WeightedSimilarities(values, given.weights.detach().flatten().cpu().double())


def _mean(similarities: WeightedSimilarities) -> float:
    return float(similarities.values @ similarities.weights / similarities.weights.sum())
