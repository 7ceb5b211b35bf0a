"""Statistics of the N x N similarities of all ranks, from one exchange.

A pair (image i, text j) is **positive** if they belong together and **negative** if not, so neither
two equal captions nor two captions of one picture make a negative. The sums behind the loss are
different on purpose: they split the matrix as training does, into own pairs i = j and all others
i != j.

``constellation``, ``logits`` and ``cross_uniformity`` turn the result into numbers without any
communication.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import (
    AccumulatorSpec,
    ExchangeName,
    gather_rows,
    max_over_ranks,
    prepare_exchange,
    sum_over_ranks,
)
from dist_siglip.errors import UserError
from dist_siglip.metrics.retrieval.positives import PositivePairs
from dist_siglip.metrics.rows import check_features, raise_together
from dist_siglip.metrics.tiles import exact_similarity, squared_norms, tile_side, tile_slices

# Histograms of cosines have bins of 2 / 20000 = 1e-4 over [-1, 1].
NUM_BINS = 20_000
# Up to so many pairs of a kind over all ranks, their cosines are kept and quantiles are exact.
MOST_EXACT_PAIRS = 65_536


@dataclass(frozen=True, kw_only=True)
class RowMargins:
    """Margins of the rows of one modality, each with a threshold of its own.

        margin of row i = (min over its positives of s_ij - max over its negatives of s_ij) / 2

    A row finds its match exactly if its margin is above 0. Softmax losses ask for no more; the
    sigmoid loss asks for one threshold for all rows (``constellation``), so the smallest of these
    margins is never below that of all pairs.

    Attributes:
        count: rows of all ranks that have a positive and a negative pair.
        minimum: smallest margin; NaN without such rows.
        mean: mean margin; NaN without such rows.
    """

    count: int
    minimum: float
    mean: float


def no_row_ends(num_rows: int, device: torch.device) -> Tensor:
    """Row ends before any pair is visited: (rows, 2) float64 of -inf.

    Column 0 is the largest negative cosine, column 1 minus the smallest positive one.
    """
    return torch.full((num_rows, 2), -torch.inf, dtype=torch.float64, device=device)


def widen_row_ends(
    cosines: Tensor, is_positive: Tensor | None, row_ends: Tensor, column_ends: Tensor
) -> None:
    """Update the ends of the rows and columns of a tile of cosines, in place.

    Args:
        cosines: (R, C) float64.
        is_positive: (R, C) bool; None if no pair is.
        row_ends: (R, 2), as in ``no_row_ends``.
        column_ends: (C, 2).
    """
    negative = cosines if is_positive is None else cosines.masked_fill(is_positive, -torch.inf)
    for dim, ends in ((1, row_ends), (0, column_ends)):
        torch.maximum(ends[:, 0], negative.amax(dim=dim), out=ends[:, 0])
    if is_positive is None:
        return
    positive = (-cosines).masked_fill_(~is_positive, -torch.inf)
    for dim, ends in ((1, row_ends), (0, column_ends)):
        torch.maximum(ends[:, 1], positive.amax(dim=dim), out=ends[:, 1])


def summarise_rows(row_ends: Tensor, group: ProcessGroup | None = None) -> RowMargins:
    """Turn the ends of this rank's rows into margins of the rows of all ranks.

    Distributed contract: two all-reduces; every rank gets the same result.

    Args:
        row_ends: (B, 2), as in ``no_row_ends``.
        group: process group.
    """
    margins = -row_ends.sum(dim=1) / 2
    margins = margins[torch.isfinite(margins)]
    sums = torch.stack([margins.new_tensor(len(margins)), margins.sum()])
    count, total = sum_over_ranks(sums, group).tolist()
    smallest = (-margins).max() if len(margins) else margins.new_tensor(-torch.inf)
    minimum = -float(max_over_ranks(smallest, group))
    if not count:
        return RowMargins(count=0, minimum=math.nan, mean=math.nan)
    return RowMargins(count=int(count), minimum=minimum, mean=total / count)


@dataclass(frozen=True, kw_only=True)
class CosineSummary:
    """The cosines of one kind of pairs, as sums, extremes and a histogram.

    Attributes:
        count: number of pairs.
        total: sum of cosines.
        total_of_squares: sum of squared cosines.
        minimum: smallest cosine, exact; NaN without pairs.
        maximum: largest cosine, exact; NaN without pairs.
        histogram: (NUM_BINS,) int64 counts in equal bins over [-1, 1].
        cosines: (count,) float64, ascending; None for more than ``MOST_EXACT_PAIRS`` pairs.
    """

    count: int
    total: float
    total_of_squares: float
    minimum: float
    maximum: float
    histogram: Tensor
    cosines: Tensor | None = None

    @property
    def mean(self) -> float:
        """Mean cosine; NaN without pairs."""
        return self.total / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        """Standard deviation over the pairs (divided by their number); NaN without pairs."""
        if not self.count:
            return math.nan
        return math.sqrt(max(0.0, self.total_of_squares / self.count - self.mean**2))

    def quantile(self, fraction: float) -> float:
        """Cosine at ``fraction`` of the pairs, as ``numpy.quantile`` has it by default ("linear").

            h = fraction * (count - 1)
            quantile = c[floor h] + (h - floor h) * (c[ceil h] - c[floor h])

        with c the cosines in ascending order.

        Exact for up to ``MOST_EXACT_PAIRS`` pairs, within a bin (1e-4) for more.

        Args:
            fraction: from 0 to 1.

        Returns:
            The quantile; NaN without pairs.

        Source:
            Hyndman and Fan 1996, definition 7.
        """
        if not self.count:
            return math.nan
        place = fraction * (self.count - 1)
        low, high = (self._cosine_at(int(end)) for end in (math.floor(place), math.ceil(place)))
        return low + (place - math.floor(place)) * (high - low)

    def _cosine_at(self, place: int) -> float:
        """Cosine number ``place`` from below; from a histogram the middle of its share of a bin."""
        if self.cosines is not None:
            return float(self.cosines[place])
        cumulative = self.histogram.cumsum(0)
        bin_index = int(torch.searchsorted(cumulative, place, right=True))
        inside = int(self.histogram[bin_index])
        part = (place - int(cumulative[bin_index]) + inside + 0.5) / inside
        return min(max(-1 + 2 * (bin_index + part) / NUM_BINS, self.minimum), self.maximum)


@dataclass(frozen=True, kw_only=True)
class PairStatistics:
    """Statistics of the pairs of all ranks; equal on every rank.

    Attributes:
        num_pairs: N, the rows of all ranks.
        positive: cosines of images and texts that belong together.
        negative: cosines of those that do not.
        image_rows: margins of images among all texts, each with a threshold of its own.
        text_rows: margins of texts among all images.
        own_softplus_sum: sum over i of softplus(-z[i, i]).
        other_softplus_sum: sum over i != j of softplus(z[i, j]).
        other_kernel_sum: sum over i != j of exp(-2 |x_i - y_j|^2).
        logit_scale: t of z = t * cosine + b.
        logit_bias: b, added.
    """

    num_pairs: int
    positive: CosineSummary
    negative: CosineSummary
    image_rows: RowMargins
    text_rows: RowMargins
    own_softplus_sum: float
    other_softplus_sum: float
    other_kernel_sum: float
    logit_scale: float
    logit_bias: float


def histogram_edges() -> Tensor:
    """Edges of the bins of ``CosineSummary.histogram``, (NUM_BINS + 1,) float64.

    Example:
        >>> histogram_edges()[[0, -1]]
        tensor([-1.,  1.], dtype=torch.float64)
    """
    return torch.linspace(-1, 1, NUM_BINS + 1, dtype=torch.float64)


class _Sums:
    """Running sums on the device; index 0 is negative, 1 positive."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.moments = torch.zeros(2, 3, dtype=torch.float64, device=device)
        # Maxima of the cosine and of its negative, so that one maximum serves both ends.
        self.extremes = torch.full((2, 2), -torch.inf, dtype=torch.float64, device=device)
        self.histogram = torch.zeros(2 * NUM_BINS, dtype=torch.int64, device=device)
        # Of own and other pairs: softplus; and the Gaussian kernel of other pairs.
        self.softplus = torch.zeros(3, dtype=torch.float64, device=device)
        # Cosines of either kind while there are few.
        self.few: list[list[Tensor] | None] = [[], []]
        self.num_few = [0, 0]
        self.row_ends = no_row_ends(num_rows, device)

    def add_cosines(self, cosines: Tensor, is_positive: Tensor | None, num_positive: int) -> None:
        """Add a rectangle.

        Args:
            cosines: (R, C) float64.
            is_positive: (R, C) bool; None where it has no positive pair, as most have.
            num_positive: positive pairs of it.
        """
        self._add_kind(0, cosines, is_positive, cosines.numel() - num_positive)
        if is_positive is not None:
            self._add_kind(1, cosines, ~is_positive, num_positive)
        bins = ((cosines + 1) * (NUM_BINS / 2)).long().clamp_(0, NUM_BINS - 1)
        if is_positive is not None:
            bins += NUM_BINS * is_positive
        if bins.device.type == "cpu":
            self.histogram += torch.bincount(bins.flatten(), minlength=2 * NUM_BINS)
        else:  # bincount reads the largest bin there
            one = bins.new_ones(())
            self.histogram.scatter_add_(0, bins.flatten(), one.expand(bins.numel()))

    def _add_kind(self, kind: int, cosines: Tensor, others: Tensor | None, count: int) -> None:
        """Add the pairs of a kind: all but ``others``, ``count`` of them."""
        if not count:
            return
        chosen = cosines if others is None else cosines.masked_fill(others, 0)
        self.moments[kind, 0] += count
        self.moments[kind, 1] += chosen.sum()
        self.moments[kind, 2] += chosen.square().sum()
        for end, sign in enumerate((1, -1)):
            signed = cosines if sign == 1 else -cosines
            if others is not None:
                signed = signed.masked_fill(others, -torch.inf)
            self.extremes[kind, end] = torch.maximum(self.extremes[kind, end], signed.max())
        self._keep_few(kind, cosines, others, count)

    def _keep_few(self, kind: int, cosines: Tensor, others: Tensor | None, count: int) -> None:
        self.num_few[kind] += count
        if self.num_few[kind] > MOST_EXACT_PAIRS:
            self.few[kind] = None
        elif (kept := self.few[kind]) is not None:
            if others is None:
                kept.append(cosines.flatten().clone())  # the rectangle is overwritten
            else:
                places = (~others).flatten().nonzero_static(size=count)[:, 0]
                kept.append(cosines.flatten()[places])

    def gather_few(self, kind: int, count: int, group: ProcessGroup | None) -> Tensor | None:
        """Bring all cosines of a kind together, ascending; None if all ranks have too many."""
        kept = self.few[kind]
        if count > MOST_EXACT_PAIRS or kept is None:
            return None
        mine = torch.cat([self.extremes.new_empty(0), *kept])
        return gather_rows(mine, group).sort().values.cpu()


@torch.no_grad()
def collect_pair_statistics(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    logit_scale: float,
    logit_bias: float,
    positives: PositivePairs | None = None,
    chunk_rows: int | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> PairStatistics:
    """Visit every pair of all ranks once and keep sums.

    Distributed contract: every rank passes its own pairs (0 too); one exchange of the text shards
    without gradient, which brings two numbers for each text back, then eight all-reduces, and a
    gather of the cosines of a kind of few pairs. Every rank gets the same statistics.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised; row i belongs to image i.
        image_ids: (B,) int64.
        text_ids: (B,) int64; belongs to ``image_ids`` row by row, since row i is a pair.
        logit_scale: multiplier > 0.
        logit_bias: added to every logit.
        positives: which ids belong together; None: those that are equal.
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
        exchange: how the texts reach the other ranks.
        group: process group.

    Returns:
        Sums in float64, counts exact.

    Raises:
        UserError: if features are not finite or not normalised (names row and rank), numbers
            of rows differ, scale or bias are out of range or differ between ranks, or no rank has
            any pair; on every rank.

    Example:
        >>> features, ids = torch.eye(2), torch.tensor([0, 1])
        >>> statistics = collect_pair_statistics(
        ...     features, features, ids, ids, logit_scale=10.0, logit_bias=-10.0
        ... )
        >>> statistics.positive.minimum, statistics.negative.maximum
        (1.0, 0.0)
    """
    check_features(
        [("image_features", image_features), ("text_features", text_features)],
        [("image_ids", image_ids), ("text_ids", text_ids)],
        unit_norm=True,
        paired=True,
        group=group,
    )
    problem = None
    if not 0 < logit_scale < math.inf or not math.isfinite(logit_bias):
        problem = (
            f"logit_scale ({logit_scale}) must be a finite number above 0 and logit_bias "
            f"({logit_bias}) finite"
        )
    raise_together(problem, device=image_features.device, group=group)
    side = tile_side(chunk_rows, image_features.device)
    prepared = prepare_exchange(
        [text_features, text_ids],
        accumulators=[AccumulatorSpec((2,), torch.float64)],
        combine="max",
        exchange=exchange,
        group=group,
        purpose="pair statistics",
        shared={"logit_scale": logit_scale, "logit_bias": logit_bias},
    )
    if prepared.total_rows == 0:
        raise UserError("no rank has any pair to evaluate; check the validation data")
    positives = PositivePairs() if positives is None else positives
    sums = _Sums(len(image_ids), image_features.device)
    image_squares = squared_norms(image_features)

    def visit(owner: int, shard: tuple[Tensor, ...], contributions: tuple[Tensor, ...]) -> None:
        features, ids = shard
        text_squares = squared_norms(features)
        contributions[0].fill_(-torch.inf)
        found = positives.between(image_ids, ids, side)
        for rows, columns in tile_slices(len(image_ids), len(ids), side):
            cosines = exact_similarity(image_features[rows], features[columns])
            is_positive = found.mask(rows, columns)
            sums.add_cosines(cosines, is_positive, found.count(rows, columns))
            widen_row_ends(cosines, is_positive, sums.row_ends[rows], contributions[0][columns])
            logits = logit_scale * cosines + logit_bias
            # softplus(z) = -logsigmoid(-z), exact for any z.
            losses = -F.logsigmoid(-logits)
            # -2 |x - y|^2 = 4 <x, y> - 2 |x|^2 - 2 |y|^2
            kernel = cosines.mul_(4).sub_(2 * image_squares[rows, None])
            kernel.sub_(2 * text_squares[None, columns]).clamp_(max=0).exp_()
            if owner == prepared.rank and rows == columns:
                sums.softplus[0] += -F.logsigmoid(logits.diagonal()).sum()
                losses.fill_diagonal_(0)
                kernel.fill_diagonal_(0)
            sums.softplus[1] += losses.sum()
            sums.softplus[2] += kernel.sum()

    (text_ends,) = prepared.run(visit)
    moments = sum_over_ranks(sums.moments, group).cpu()
    own, other, kernel_sum = sum_over_ranks(sums.softplus, group).tolist()
    histogram = sum_over_ranks(sums.histogram, group).cpu()
    extremes = max_over_ranks(sums.extremes, group).cpu()

    def summarise(kind: int) -> CosineSummary:
        bins = histogram[NUM_BINS * kind : NUM_BINS * (kind + 1)]
        few = sums.gather_few(kind, int(moments[kind, 0]), group)
        return _summarise(moments[kind], extremes[kind], bins, few)

    return PairStatistics(
        num_pairs=prepared.total_rows,
        positive=summarise(1),
        negative=summarise(0),
        image_rows=summarise_rows(sums.row_ends, group),
        text_rows=summarise_rows(text_ends, group),
        own_softplus_sum=own,
        other_softplus_sum=other,
        other_kernel_sum=kernel_sum,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
    )


def _summarise(
    moments: Tensor, extremes: Tensor, histogram: Tensor, cosines: Tensor | None
) -> CosineSummary:
    count = int(moments[0])
    return CosineSummary(
        count=count,
        total=float(moments[1]),
        total_of_squares=float(moments[2]),
        minimum=-float(extremes[1]) if count else math.nan,
        maximum=float(extremes[0]) if count else math.nan,
        histogram=histogram,
        cosines=cosines,
    )
