"""Margin and threshold between the positive and the negative pairs.

With s the cosine of a pair, a configuration is a (d, margin, relative bias) constellation if
s >= relative_bias + margin for every positive and s <= relative_bias - margin for every negative
pair. Zero sigmoid loss is possible exactly then.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dist_siglip.errors import UserError
from dist_siglip.metrics.geometry.pair_statistics import PairStatistics


class Constellation(NamedTuple):
    """Ends of the positive and negative cosines, and the threshold between them.

    Attributes:
        margin: half the gap, (positive_end - negative_end) / 2; negative if the kinds overlap.
        relative_bias: the best threshold, (positive_end + negative_end) / 2.
        positive_end: lower end of the positive cosines.
        negative_end: upper end of the negative cosines.
    """

    margin: float
    relative_bias: float
    positive_end: float
    negative_end: float


def constellation(statistics: PairStatistics) -> Constellation:
    """Margin and relative bias from the extremes of all pairs, exact.

        margin        = (min positive - max negative) / 2
        relative_bias = (min positive + max negative) / 2

    The margin is the **half** gap; published tables sometimes print the full one. NaN if
    there is no negative pair.

    Args:
        statistics: of all pairs.

    Example:
        >>> import torch
        >>> from dist_siglip.metrics.geometry.pair_statistics import collect_pair_statistics
        >>> features, ids = torch.eye(2), torch.tensor([0, 1])
        >>> statistics = collect_pair_statistics(
        ...     features, features, ids, ids, logit_scale=10.0, logit_bias=-10.0
        ... )
        >>> constellation(statistics)[:2], mean_constellation(statistics)[:2]
        ((0.5, 0.5), (0.5, 0.5))

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, equation 2 and Theorem 3.2.
    """
    return _between(statistics.positive.minimum, statistics.negative.maximum)


def quantile_constellation(statistics: PairStatistics, fraction: float = 0.05) -> Constellation:
    """Margin and relative bias when the worst ``fraction`` of each kind is left aside.

        positive_end = quantile of the positive cosines at fraction
        negative_end = quantile of the negative cosines at 1 - fraction

    Quantiles are those of ``numpy.quantile`` (linear between the two nearest): exact while a kind
    has at most 65,536 pairs (256 images and texts have as many), within 1e-4 beyond.

    Args:
        statistics: of all pairs.
        fraction: share of each kind that may lie on the wrong side, in [0, 0.5].

    Raises:
        UserError: if ``fraction`` is outside [0, 0.5].

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Table 5 (5 % and 95 %).
    """
    if not 0 <= fraction <= 0.5:
        raise UserError(f"fraction ({fraction}) must be in [0, 0.5]; the paper uses 0.05")
    return _between(
        statistics.positive.quantile(fraction), statistics.negative.quantile(1 - fraction)
    )


def mean_constellation(statistics: PairStatistics) -> Constellation:
    """Margin and relative bias between the mean positive and the mean negative cosine.

    Unlike the strict margin it is above 0 for every useful model. The bounds of ``capacity`` that
    are averages (``largest_margin``) hold for it too.

    Args:
        statistics: of all pairs.

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Table 6.
    """
    return _between(statistics.positive.mean, statistics.negative.mean)


def joint_constellation(statistics: Sequence[PairStatistics]) -> Constellation:
    """Margin and relative bias that hold for several pairs of modalities at once.

        positive_end = min over pairs of modalities        negative_end = max over them

    More than two modalities that share scale and bias need one threshold for all of them; the
    margin of each two alone may be larger.

    Args:
        statistics: of every two modalities that are compared, at least one.

    Raises:
        UserError: if there are none.

    Example:
        >>> import torch
        >>> from dist_siglip.metrics.geometry.pair_statistics import collect_pair_statistics
        >>> features, ids = torch.eye(2), torch.tensor([0, 1])
        >>> statistics = [
        ...     collect_pair_statistics(x, features, ids, ids, logit_scale=1.0, logit_bias=0.0)
        ...     for x in (features, torch.tensor([[0.8, 0.6], [0.0, 1.0]]))
        ... ]
        >>> round(joint_constellation(statistics).margin, 4)  # from 0.6 to 0.8
        0.1

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Observation 2, Table 1 (which prints twice this).
    """
    if not statistics:
        raise UserError("a joint constellation needs the statistics of at least two modalities")
    return _between(
        min(pair.positive.minimum for pair in statistics),
        max(pair.negative.maximum for pair in statistics),
    )


def _between(positive_end: float, negative_end: float) -> Constellation:
    return Constellation(
        margin=(positive_end - negative_end) / 2,
        relative_bias=(positive_end + negative_end) / 2,
        positive_end=positive_end,
        negative_end=negative_end,
    )
