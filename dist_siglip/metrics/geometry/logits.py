"""What the loss sees: the logits of positive and negative pairs, and the validation loss."""

from dist_siglip.errors import UserError
from dist_siglip.metrics.geometry.pair_statistics import CosineSummary, PairStatistics


def expected_sigmoid_loss(statistics: PairStatistics, global_batch_size: int) -> float:
    """Sigmoid loss a random batch of ``global_batch_size`` of the gallery's pairs has on average.

        loss = mean_i softplus(-z[i, i]) + (G - 1) * mean_{i != j} softplus(z[i, j])

    The training loss sums over all negatives of a batch and divides by its pairs, so losses of
    batches of different size do not compare; this one does, with the training loss at G. It
    is the plain loss of the whole gallery when G equals its number of pairs. As in training, an
    equal caption of another pair is a negative here.

    Args:
        statistics: of all pairs of the gallery, with scale and bias of the model.
        global_batch_size: G, pairs per training step over all ranks, at least 1.

    Raises:
        UserError: if G < 1, or G > 1 and the gallery has one pair.

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
    if global_batch_size < 1:
        raise UserError(f"global_batch_size ({global_batch_size}) must be at least 1")
    num_pairs = statistics.num_pairs
    own = statistics.own_softplus_sum / num_pairs
    if global_batch_size == 1:
        return own
    if num_pairs == 1:
        raise UserError("a gallery of 1 pair has no negatives; evaluate at least 2 pairs")
    other = statistics.other_softplus_sum / (num_pairs * (num_pairs - 1))
    return own + (global_batch_size - 1) * other


def logit_summary(statistics: PairStatistics) -> dict[str, float]:
    """Mean, standard deviation and extremes of positive and negative logits.

    Args:
        statistics: of all pairs of the gallery, with scale and bias of the model.

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
