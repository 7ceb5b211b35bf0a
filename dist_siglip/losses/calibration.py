"""Calibration of scale and bias to given similarities and the global batch of a run.

Under a sigmoid loss the best bias depends on the number of negatives (it moves by about -log N),
and a checkpoint trained with a softmax loss has none at all: with its scale of 100 and a bias of 0
each negative of typical CLIP features costs 15, each image 490,000 in a batch of 32,768. Two
numbers repair that, and finding them is a convex problem: a logistic regression on the
similarities of a few thousand pairs, in which each non-pair counts as often as it occurs in a
global batch. ``collect_similarities`` collects them over ranks; the fit itself
communicates nothing.
"""

import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import (
    ExchangeName,
    gather_rows,
    max_over_ranks,
    prepare_exchange,
    sum_over_ranks,
)
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import check_pairs
from dist_siglip.losses.kernels.pair_terms import Duplicates, join_ids, share_an_id
from dist_siglip.losses.logit_scale import START_BIAS, START_SCALE, LogitScaleBias

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
    scale_before: float = START_SCALE,
    bias_before: float = START_BIAS,
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


# Bins of the similarities of non-pairs, each represented by the mean of its members: within 1e-4
# the softplus is straight to (200 * 1e-4)^2 / 24 = 2e-5 of its value at a scale of 200.
_NUM_BINS = 20_000
_CHUNK_ROWS = 1024


def calibrate_on_features(
    image_features: Tensor,
    text_features: Tensor,
    global_batch_size: int,
    *,
    scale_before: float = START_SCALE,
    bias_before: float = START_BIAS,
    caption_ids: Tensor | None = None,
    picture_ids: Tensor | None = None,
    duplicates: Duplicates = "negative",
    mined_negatives: float = 0,
    mined_weight: float = 1.0,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> Calibration:
    """Fit scale and bias to the pairs of all ranks; see ``calibrate_scale_bias``.

    Distributed contract: every rank passes its own pairs, any number of them (0 too); one pass
    of the texts without gradient, then small sums. Every rank gets the same numbers to the bit,
    and up to rounding they are the same however the pairs are distributed.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised; row i belongs to image i.
        global_batch_size: N, pairs of a training batch over all ranks; not the number given here.
        scale_before: multiplier for ``loss_before``.
        bias_before: bias for ``loss_before``.
        caption_ids: (B,) int64, equal for equal captions; needed unless duplicates are negative.
        picture_ids: (B,) int64, equal for equal pictures; None if they are not known.
        duplicates: what the loss makes of an equal caption, or picture, of another pair.
        mined_negatives: of the N - 1 non-pairs of an image, how many count more, the hardest; they
            are taken from the non-pairs of all images together.
        mined_weight: how much more these count.
        exchange: how the texts reach the other ranks.
        group: process group.

    Raises:
        UserError: if features are not finite, all ranks together have fewer than 2 pairs, or no
            scale above 0 fits; on every rank.

    Example:
        >>> images = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> texts = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.6, 0.8]])
        >>> fitted = calibrate_on_features(images, texts, 16)
        >>> round(fitted.relative_bias, 2), fitted.loss_after < fitted.loss_before
        (1.62, True)
    """
    positives, negatives = collect_similarities(
        image_features,
        text_features,
        global_batch_size,
        caption_ids=caption_ids,
        picture_ids=picture_ids,
        duplicates=duplicates,
        exchange=exchange,
        group=group,
    )
    return calibrate_scale_bias(
        positives,
        with_mined(negatives, mined_negatives, mined_weight),
        global_batch_size,
        scale_before=scale_before,
        bias_before=bias_before,
    )


@torch.no_grad()
def collect_similarities(
    image_features: Tensor,
    text_features: Tensor,
    global_batch_size: int,
    *,
    caption_ids: Tensor | None = None,
    picture_ids: Tensor | None = None,
    duplicates: Duplicates = "negative",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> tuple[WeightedSimilarities, WeightedSimilarities]:
    """Collect the similarities of pairs and non-pairs; contract as ``calibrate_on_features``.

    Own pairs are kept one by one, all others in bins of 1e-4 with the mean of their members.

    Returns:
        (pairs, non-pairs), equal on every rank, weighted for a batch of ``global_batch_size``.

    Example:
        >>> features = torch.eye(2)
        >>> pairs, others = collect_similarities(features, features, 9)
        >>> pairs.values, others
        (tensor([1., 1.], dtype=torch.float64), WeightedSimilarities(values=tensor([0.], \
dtype=torch.float64), weights=tensor([8.], dtype=torch.float64)))
    """
    if duplicates != "negative" and caption_ids is None:
        raise UserError(f"duplicates ({duplicates!r}) needs caption_ids to know equal captions by")
    check_pairs(image_features, text_features)
    image_features, text_features = _wide(image_features), _wide(text_features)
    _check_finite(image_features, text_features, group)
    columns = [text_features]
    ids = None if duplicates == "negative" else join_ids(caption_ids, picture_ids)
    if ids is not None:
        columns.append(ids.to(text_features.device))
    plan = prepare_exchange(
        columns,
        exchange=exchange,
        group=group,
        purpose=f"calibration; batch of {global_batch_size}; duplicates: {duplicates}",
    )
    if plan.total_rows < 2:
        raise UserError(f"pairs to calibrate on ({plan.total_rows}) must be at least 2")
    # Kinds: equal captions, others. For each bin, how many and the sum of their similarities.
    bins = torch.zeros(2, 2, _NUM_BINS, dtype=torch.float64)

    def visit(owner: int, shard: tuple[Tensor, ...], _contributions: tuple[Tensor, ...]) -> None:
        for row in range(0, len(image_features), _CHUNK_ROWS):
            rows = slice(row, row + _CHUNK_ROWS)
            # Counted on the CPU: sums by bin are not deterministic on a GPU.
            similarities = (image_features[rows] @ shard[0].T).cpu()
            is_equal = torch.zeros_like(similarities, dtype=torch.bool)
            if len(shard) > 1:
                is_equal = share_an_id(columns[1][rows], shard[1]).cpu()
            is_other = torch.ones_like(is_equal)
            if owner == plan.rank:
                is_other.diagonal(row).fill_(False)
            for kind, mask in enumerate((is_other & is_equal, is_other & ~is_equal)):
                _count(bins[kind], similarities[mask])

    plan.run(visit)
    bins = sum_over_ranks(bins.to(image_features.device), group).cpu()
    own = gather_rows((image_features * text_features).sum(dim=1), group).cpu()
    pairs = WeightedSimilarities(own, torch.full_like(own, 1 / len(own)))
    # What one of all ordered couples of different pairs weighs.
    share = (global_batch_size - 1) / (plan.total_rows * (plan.total_rows - 1))
    equal, others = (_summarise(kind, share) for kind in bins)
    if duplicates == "positive":
        pairs = WeightedSimilarities(
            torch.cat([pairs.values, equal.values]), torch.cat([pairs.weights, equal.weights])
        )
    return pairs, others


def with_mined(
    negatives: WeightedSimilarities, mined_negatives: float, mined_weight: float
) -> WeightedSimilarities:
    """Let the hardest non-pairs count more.

    Args:
        negatives: of an image in a global batch.
        mined_negatives: how many of them, from the largest.
        mined_weight: how much more.

    Example:
        >>> few = WeightedSimilarities(torch.tensor([0.1, 0.5]), torch.tensor([6.0, 1.0]))
        >>> with_mined(few, 2, 0.5).weights
        tensor([6.5000, 1.5000])
    """
    order = negatives.values.argsort(descending=True)
    weights = negatives.weights[order]
    harder = weights.cumsum(0) - weights
    mined = torch.minimum(weights, (mined_negatives - harder).clamp(min=0))
    return negatives._replace(weights=negatives.weights.index_add(0, order, mined_weight * mined))


def _count(bins: Tensor, similarities: Tensor) -> None:
    """Add similarities to (2, bins): their number, and their sum."""
    places = ((similarities + 1) * (_NUM_BINS / 2)).long().clamp_(0, _NUM_BINS - 1)
    bins[0] += torch.bincount(places, minlength=_NUM_BINS)
    bins[1] += torch.bincount(places, weights=similarities, minlength=_NUM_BINS)


def _summarise(bins: Tensor, share: float) -> WeightedSimilarities:
    counts, totals = bins[:, bins[0] > 0]
    return WeightedSimilarities(totals / counts, counts * share)


def _wide(features: Tensor) -> Tensor:
    """Widen to float64, on the CPU where the device (Apple's GPUs) has none."""
    return (
        features.detach().cpu() if features.device.type == "mps" else features.detach()
    ).double()


def _check_finite(images: Tensor, texts: Tensor, group: ProcessGroup | None) -> None:
    """Refuse on all ranks what one of them cannot use."""
    is_bad = ~(images.isfinite().all() & texts.isfinite().all())
    if max_over_ranks(is_bad.double(), group) > 0:
        raise UserError("features to calibrate on are not all finite; check the weights")
