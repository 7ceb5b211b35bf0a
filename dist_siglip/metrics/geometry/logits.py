"""Logits of positive and negative pairs, the validation loss, and the recall that it guarantees."""

import math
from typing import NamedTuple

from dist_siglip.errors import UserError, check_least
from dist_siglip.metrics.geometry.pair_statistics import CosineSummary, PairStatistics


def expected_sigmoid_loss(statistics: PairStatistics, global_batch_size: int) -> float:
    """Mean sigmoid loss of random batches of ``global_batch_size`` pairs.

        loss = mean_i softplus(-z[i, i]) + (G - 1) * mean_{i != j} softplus(z[i, j])

    The training loss sums over all negatives of a batch and divides by its pairs, so losses of
    batches of different size do not compare; this one does, with the training loss at G. It
    is the plain loss of all pairs when G equals their number. As in training, an
    equal caption of another pair is a negative here.

    Args:
        statistics: of all pairs, with scale and bias of the model.
        global_batch_size: G, pairs per training step over all ranks, at least 1.

    Raises:
        UserError: if G < 1, or G > 1 and there is one pair only.

    Example:
        >>> import torch
        >>> from dist_siglip.metrics.geometry.pair_statistics import collect_pair_statistics
        >>> features, ids = torch.eye(2), torch.tensor([0, 1])
        >>> statistics = collect_pair_statistics(
        ...     features, features, ids, ids, logit_scale=1.0, logit_bias=0.0
        ... )
        >>> round(expected_sigmoid_loss(statistics, 2), 4)  # log(1 + 1/e) + log(2)
        1.0064

    Source:
        Zhai et al. 2023, arXiv:2303.15343, Algorithm 1, for the loss of one batch.
    """
    check_least(1, global_batch_size=global_batch_size)
    num_pairs = statistics.num_pairs
    own = statistics.own_softplus_sum / num_pairs
    if global_batch_size == 1:
        return own
    if num_pairs == 1:
        raise UserError("1 pair has no negatives; evaluate at least 2 pairs")
    other = statistics.other_softplus_sum / (num_pairs * (num_pairs - 1))
    return own + (global_batch_size - 1) * other


def logit_summary(statistics: PairStatistics) -> dict[str, float]:
    """Mean, standard deviation and extremes of positive and negative logits.

    Args:
        statistics: of all pairs, with scale and bias of the model.

    Returns:
        ``positive_logit_mean``, ``_std``, ``_min``, ``_max`` and the same for ``negative_logit``;
        NaN for a kind without pairs.

    Example:
        >>> import torch
        >>> from dist_siglip.metrics.geometry.pair_statistics import collect_pair_statistics
        >>> features, ids = torch.eye(2), torch.tensor([0, 1])
        >>> statistics = collect_pair_statistics(
        ...     features, features, ids, ids, logit_scale=10.0, logit_bias=-4.0
        ... )
        >>> summary = logit_summary(statistics)
        >>> summary["positive_logit_mean"], summary["negative_logit_max"]
        (6.0, -4.0)
    """
    scale, bias = statistics.logit_scale, statistics.logit_bias
    summary: dict[str, float] = {}
    kinds: tuple[tuple[str, CosineSummary], ...] = (
        ("positive_logit", statistics.positive),
        ("negative_logit", statistics.negative),
    )
    for name, cosines in kinds:
        # Logits are an affine image of the cosines, and logit_scale > 0 keeps their order.
        summary[f"{name}_mean"] = scale * cosines.mean + bias
        summary[f"{name}_std"] = scale * cosines.std
        summary[f"{name}_min"] = scale * cosines.minimum + bias
        summary[f"{name}_max"] = scale * cosines.maximum + bias
    return summary


class RetrievalGuarantee(NamedTuple):
    """Retrieval that a loss guarantees.

    Attributes:
        recall: share of items found first, in either direction, that cannot be undercut; 0 if
            nothing is guaranteed.
        xi: loss of a batch in units of log 2.
        is_vacuous: whether nothing is guaranteed.
    """

    recall: float
    xi: float
    is_vacuous: bool


def retrieval_guarantee(loss: float, global_batch_size: int, num_pairs: int) -> RetrievalGuarantee:
    """Bound recall@1 from below by the mean loss of random batches.

        recall@1 >= 1 - N xi / (B (B - 1))      xi = B * loss / log 2

    with the loss summed over the pairs of a batch and divided by B, as everywhere in this package.
    It holds for any B up to N; the largest bound is that of B = N.

    An item whose nearest neighbour is not its match lies in a pair that costs at least log 2: its
    own, with a logit of at most 0, or one with another item, with a logit of at least 0. So wrong
    items times log 2 cannot exceed the loss of all pairs. Nothing else is used, so the bound is
    weak: it is 0 as soon as the loss is log 2 per pair.

    Args:
        loss: expected loss of a batch, of ``expected_sigmoid_loss``; in it every other pair
            counts as negative, equal captions too.
        global_batch_size: B, pairs of the batches, from 2 to N.
        num_pairs: N, all pairs.

    Raises:
        UserError: if B is not from 2 to N, or the loss negative.

    Example:
        >>> round(retrieval_guarantee(0.01, 1000, 2000).recall, 3)
        0.971
        >>> retrieval_guarantee(3.0, 1000, 2000)[::2]
        (0.0, True)

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Proposition 1, whose loss is the sum (not divided
        by B) and which states it for sqrt(N) < B < N.
    """
    if not 2 <= global_batch_size <= num_pairs:
        raise UserError(
            f"global_batch_size ({global_batch_size}) must be from 2 to the number of pairs "
            f"({num_pairs}); evaluate more pairs, or bound by the loss of all pairs"
        )
    if not loss >= 0:
        raise UserError(f"loss ({loss}) must be at least 0")
    xi = global_batch_size * loss / math.log(2)
    recall = 1 - num_pairs * xi / (global_batch_size * (global_batch_size - 1))
    return RetrievalGuarantee(max(0.0, recall), xi, recall <= 0)
