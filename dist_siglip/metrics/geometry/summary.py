"""All metrics of the geometry of a validation set, by name.

``evaluate_pairs`` takes its geometry from here: thresholds from the sums over pairs, modalities
from the rows themselves. Each number is defined where it is computed.
"""

import math

import numpy as np
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName
from dist_siglip.losses.arguments import DEFAULT_CHUNK_ROWS
from dist_siglip.metrics.geometry.constellation import (
    constellation,
    mean_constellation,
    quantile_constellation,
)
from dist_siglip.metrics.geometry.gap import modality_gap
from dist_siglip.metrics.geometry.logits import expected_sigmoid_loss, retrieval_guarantee
from dist_siglip.metrics.geometry.pair_statistics import PairStatistics
from dist_siglip.metrics.geometry.separability import (
    SEPARABILITY_PAIRS,
    linear_separability,
    separating_direction,
)
from dist_siglip.metrics.geometry.spectrum import (
    collect_moments,
    components_for,
    explained_variance_ratios,
    rank_of_moments,
)
from dist_siglip.metrics.geometry.uniformity import cross_uniformity, uniformity
from dist_siglip.metrics.retrieval.hubness import hubness

# The k of the k-occurrences, as in most of the literature.
HUBNESS_K = 10


def threshold_metrics(statistics: PairStatistics) -> dict[str, float]:
    """Metrics of one threshold, or one per row, between positive and negative pairs.

    Args:
        statistics: of all pairs.

    Returns:
        ``margin``, ``relative_bias`` and the same ending in ``_5_95`` and ``_of_means``;
        ``image_row_margin_min``, ``_mean``, ``text_row_margin_...``; ``guaranteed_recall@1``;
        ``cross_uniformity``. NaN where there is nothing to measure.
    """
    metrics: dict[str, float] = {}
    for suffix, found in (
        ("", constellation(statistics)),
        ("_5_95", quantile_constellation(statistics, 0.05)),
        ("_of_means", mean_constellation(statistics)),
    ):
        metrics[f"margin{suffix}"] = found.margin
        metrics[f"relative_bias{suffix}"] = found.relative_bias
    for side, rows in (("image", statistics.image_rows), ("text", statistics.text_rows)):
        metrics[f"{side}_row_margin_min"] = rows.minimum
        metrics[f"{side}_row_margin_mean"] = rows.mean
    metrics["cross_uniformity"] = cross_uniformity(statistics)
    metrics["guaranteed_recall@1"] = math.nan
    if statistics.num_pairs > 1:
        # Of all batch sizes, that of all pairs gives the largest bound.
        loss = expected_sigmoid_loss(statistics, statistics.num_pairs)
        bound = retrieval_guarantee(loss, statistics.num_pairs, statistics.num_pairs)
        metrics["guaranteed_recall@1"] = bound.recall
    return metrics


def modality_metrics(
    image_features: Tensor,
    text_features: Tensor,
    sample_ids: Tensor,
    *,
    separability_pairs: int = SEPARABILITY_PAIRS,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics of the two modalities: how they lie to each other, and how each of them spreads.

    Distributed contract: every rank passes its own pairs, each sample once over all ranks; four
    exchanges without gradient, small gathers and two all-reduces of (D + 1)^2 numbers. Every rank
    gets the same result.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised; row i belongs to image i.
        sample_ids: (B,) int64.
        separability_pairs: most pairs that are fitted to tell images from texts.
        chunk_rows: longest side of a live rectangle of similarities.
        exchange: how shards reach the other ranks.
        group: process group.

    Returns:
        (metrics, arrays). Metrics: those of ``ModalityGap``, with ``modality_gap`` for the distance
        of centroids; ``image_uniformity``, ``image_effective_rank``, ``image_components_80``,
        ``image_components_90`` and the same for texts; ``image_to_text_hubness``,
        ``image_to_text_top_hub_share``, ``image_to_text_orphans`` (texts that no image finds) and
        ``text_to_image_...``; ``linear_separability``; ``images_on_their_side`` and
        ``texts_on_their_side`` of a plane through the origin. Arrays: ``image_explained_variance``
        and ``text_explained_variance`` (D,), ``separating_direction`` (D,).

    """
    sides = {"image": image_features, "text": text_features}
    gap = modality_gap(image_features, text_features, group=group)._asdict()
    metrics: dict[str, float] = {"modality_gap": gap.pop("centroid_distance"), **gap}
    arrays: dict[str, np.ndarray] = {}
    for side, features in sides.items():
        metrics[f"{side}_uniformity"] = uniformity(
            features, chunk_rows=chunk_rows, exchange=exchange, group=group
        )
        moments = collect_moments(features, group=group)
        ratios = explained_variance_ratios(moments)
        metrics[f"{side}_effective_rank"] = rank_of_moments(moments)
        for percent in (80, 90):
            metrics[f"{side}_components_{percent}"] = components_for(ratios, percent / 100)
        arrays[f"{side}_explained_variance"] = ratios.numpy()
    for query, key in (("image", "text"), ("text", "image")):
        found = hubness(
            sides[query],
            sides[key],
            HUBNESS_K,
            chunk_rows=chunk_rows,
            exchange=exchange,
            group=group,
        )
        for name, value in (
            ("hubness", found.skewness),
            ("top_hub_share", found.top_share),
            ("orphans", found.antihubs),
        ):
            metrics[f"{query}_to_{key}_{name}"] = value
    metrics["linear_separability"] = linear_separability(
        image_features, text_features, sample_ids, max_pairs=separability_pairs, group=group
    )
    plane = separating_direction(
        image_features, text_features, sample_ids, max_pairs=separability_pairs, group=group
    )
    metrics["images_on_their_side"] = plane.images_above / plane.num_pairs
    metrics["texts_on_their_side"] = plane.texts_below / plane.num_pairs
    arrays["separating_direction"] = plane.direction.numpy()
    return metrics, arrays
