"""All metrics of a validation set of image-text pairs, as one flat dictionary.

``evaluate_pairs`` is the composition; ``PairEvaluation`` collects the rows of a validation epoch
for it. A new metric is a pure function in its own file and one line here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torchmetrics import Metric

from dist_siglip.distributed import ExchangeName
from dist_siglip.metrics.geometry.gap import (
    SEPARABILITY_PAIRS,
    linear_separability,
    modality_gap,
    separating_direction,
)
from dist_siglip.metrics.geometry.logits import (
    expected_sigmoid_loss,
    logit_summary,
    retrieval_guarantee,
)
from dist_siglip.metrics.geometry.margins import (
    constellation,
    mean_constellation,
    quantile_constellation,
)
from dist_siglip.metrics.geometry.pair_statistics import (
    PairStatistics,
    collect_pair_statistics,
    histogram_edges,
)
from dist_siglip.metrics.geometry.spread import (
    collect_moments,
    components_for,
    cross_uniformity,
    explained_variance_ratios,
    rank_of_moments,
    uniformity,
)
from dist_siglip.metrics.prefixes import prefix_metrics
from dist_siglip.metrics.retrieval.nearest import hubness
from dist_siglip.metrics.retrieval.positives import DistinctItems
from dist_siglip.metrics.retrieval.ranks import median_rank, recall_at_k, retrieval_ranks_both_ways
from dist_siglip.metrics.rows import (
    check_features,
    check_same_settings,
    first_occurrences,
    gather_in_order,
    raise_together,
    widen_rows,
)

# The k of the k-occurrences, as in most of the literature.
HUBNESS_K = 10
ARRAY_PAIRS = 2000  # whose features go into the arrays


def threshold_metrics(statistics: PairStatistics) -> dict[str, float]:
    """Metrics of one threshold, or one per row, between positive and negative pairs.

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
    chunk_rows: int | None = None,
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
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
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


def describe_num_pairs(metrics: Mapping[str, Any], prefix: str = "") -> str:
    """Name the number of pairs of an evaluation, and of how many where these are not all.

    Args:
        metrics: of an evaluation: ``gallery_pairs``, and ``available_pairs`` where it is known.
        prefix: of the names.

    Example:
        >>> describe_num_pairs({"gallery_pairs": 16.0, "available_pairs": 37.0})
        '16 of 37 pairs'
        >>> describe_num_pairs({"gallery_pairs": 37.0, "available_pairs": 37.0})
        '37 pairs'
    """
    seen, available = (metrics.get(f"{prefix}{kind}_pairs") for kind in ("gallery", "available"))
    if seen is None:
        return "an unknown number of pairs"
    if available is None or int(available) == int(seen):
        return f"{int(seen)} pairs"
    return f"{int(seen)} of {int(available)} pairs"


class Evaluation(NamedTuple):
    """Metrics and arrays of a validation set; equal on every rank.

    Attributes:
        metrics: name to number, see ``evaluate_pairs``.
        arrays: data of the plots, sorted by sample id: ``image_features`` and
            ``text_features`` (n, D) float32, ``sample_ids``, ``caption_ids`` and ``picture_ids``
            (n,) of the first n pairs; ``image_to_text_ranks`` and ``text_to_image_ranks`` (N,) of
            all pairs; ``histogram_edges`` (K + 1,), ``positive_histogram`` and
            ``negative_histogram`` (K,) of the cosines of all pairs; and those of
            ``modality_metrics``.
    """

    metrics: dict[str, float]
    arrays: dict[str, np.ndarray]


class _Rows(NamedTuple):
    """This rank's pairs."""

    image_features: Tensor
    text_features: Tensor
    image_ids: Tensor
    text_ids: Tensor
    sample_ids: Tensor
    picture_ids: Tensor


@torch.no_grad()
def evaluate_pairs(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    sample_ids: Tensor,
    *,
    logit_scale: float,
    logit_bias: float,
    picture_ids: Tensor | None = None,
    global_batch_size: int | None = None,
    top_k: Sequence[int] = (1, 5, 10),
    prefix_dims: Sequence[int] = (),
    array_pairs: int = ARRAY_PAIRS,
    separability_pairs: int = SEPARABILITY_PAIRS,
    chunk_rows: int | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> Evaluation:
    """Evaluate the pairs of all ranks together.

    The names, each defined where it is computed:

        retrieval     image_to_text_recall@K, image_to_text_median_rank, and text_to_image_...,
                      means over all pairs. Every different picture, or caption, is ranked once. A
                      hit is a caption of the same picture, a picture of the same caption; ties
                      count against the query
        logits        loss (of a random batch of ``global_batch_size``), positive_logit_mean, _std,
                      _min, _max, negative_logit_...
        thresholds    margin, relative_bias, margin_5_95, margin_of_means, image_row_margin_min,
                      guaranteed_recall@1, cross_uniformity, ...; see ``threshold_metrics``
        modalities    modality_gap (distance of centroids), alignment, image_uniformity,
                      image_effective_rank, image_components_80, image_to_text_hubness,
                      linear_separability, images_on_their_side, ...; see ``modality_metrics``
        counts        gallery_pairs, distinct_captions, distinct_pictures
        prefixes      prefix_64_margin, pca_64_margin, ...; see ``prefix_metrics``

    Distributed contract: every rank passes its own pairs, any number of them (0 too). Six or
    seven exchanges of the shards without gradient, and small gathers. A sample that occurs twice,
    on whatever ranks, counts once. The result does not depend on how pairs are distributed.

    Args:
        image_features: (B, D), L2-normalised, on the CPU or a CUDA device.
        text_features: (B, D), L2-normalised; row i belongs to image i.
        image_ids: (B,) int64; equal to ``text_ids`` where image and text belong together.
        text_ids: (B,) int64; equal captions have equal ids.
        sample_ids: (B,) int64, position of the pair in the data set.
        logit_scale: multiplier of the model.
        logit_bias: bias of the model, added.
        picture_ids: (B,) int64; equal pictures have equal ids. None: no picture occurs twice.
        global_batch_size: pairs per training step over all ranks; None means all pairs.
        top_k: the K of recall@K.
        prefix_dims: prefixes of the dimension that are measured too, cut and by PCA; at most D.
        array_pairs: most pairs whose features go into the arrays.
        separability_pairs: most pairs for ``linear_separability``.
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
        exchange: how shards reach the other ranks.
        group: process group.

    Raises:
        UserError: if features are not finite or not normalised (names row and rank), a row is no
            pair, there is no pair at all, or ranks pass different settings; on every rank.

    Example:
        >>> features, ids = torch.eye(3), torch.arange(3)
        >>> evaluation = evaluate_pairs(
        ...     features, features, ids, ids, ids,
        ...     logit_scale=10.0, logit_bias=-5.0, global_batch_size=3,
        ... )
        >>> evaluation.metrics["image_to_text_recall@1"], evaluation.metrics["margin"]
        (1.0, 0.5)
    """
    pictures = sample_ids if picture_ids is None else picture_ids
    rows = _Rows(image_features, text_features, image_ids, text_ids, sample_ids, pictures)
    rows = _usable_rows(rows, group)
    settings = {
        "global_batch_size": global_batch_size,
        "top_k": tuple(top_k),
        "prefix_dims": tuple(prefix_dims),
        "array_pairs": array_pairs,
        "separability_pairs": separability_pairs,
    }
    check_same_settings(settings, device=image_features.device, group=group)
    items = DistinctItems.of(rows.picture_ids, rows.text_ids, rows.sample_ids, group=group)
    image_to_text, text_to_image = items.of_all_rows(
        *retrieval_ranks_both_ways(
            _kept(rows.image_features, items.images),
            _kept(rows.text_features, items.texts),
            items.image_ids[items.images],
            items.text_ids[items.texts],
            positives=items.positives,
            chunk_rows=chunk_rows,
            exchange=exchange,
            group=group,
        ),
        group=group,
    )
    statistics = collect_pair_statistics(
        rows.image_features,
        rows.text_features,
        items.image_ids,
        items.text_ids,
        positives=items.positives,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        chunk_rows=chunk_rows,
        exchange=exchange,
        group=group,
    )
    gathered = gather_in_order([image_to_text, text_to_image], rows.sample_ids, group=group)
    ranks = dict(zip(("image_to_text", "text_to_image"), gathered, strict=True))
    batch_size = statistics.num_pairs if global_batch_size is None else global_batch_size
    metrics: dict[str, float] = {"loss": expected_sigmoid_loss(statistics, batch_size)}
    gallery_sizes = {"image_to_text": items.num_texts, "text_to_image": items.num_images}
    for direction, all_ranks in ranks.items():
        size = gallery_sizes[direction]
        for k in top_k:
            metrics[f"{direction}_recall@{k}"] = recall_at_k(all_ranks, k, gallery_size=size)
        metrics[f"{direction}_median_rank"] = median_rank(all_ranks)
    metrics |= logit_summary(statistics) | threshold_metrics(statistics)
    shape, spectra = modality_metrics(
        rows.image_features,
        rows.text_features,
        rows.sample_ids,
        separability_pairs=separability_pairs,
        chunk_rows=chunk_rows,
        exchange=exchange,
        group=group,
    )
    metrics |= shape
    metrics |= prefix_metrics(
        rows.image_features,
        rows.text_features,
        rows.sample_ids,
        items,
        prefix_dims,
        top_k=top_k,
        chunk_rows=chunk_rows,
        exchange=exchange,
        group=group,
    )
    metrics["gallery_pairs"] = float(statistics.num_pairs)
    metrics["distinct_captions"] = float(items.num_texts)
    metrics["distinct_pictures"] = float(items.num_images)
    arrays = _feature_arrays(rows, array_pairs, group) | spectra
    arrays["histogram_edges"] = histogram_edges().numpy()
    arrays["positive_histogram"] = statistics.positive.histogram.numpy()
    arrays["negative_histogram"] = statistics.negative.histogram.numpy()
    arrays |= {f"{name}_ranks": all_ranks.cpu().numpy() for name, all_ranks in ranks.items()}
    return Evaluation(metrics, arrays)


class PairEvaluation(Metric):
    """Pairs of a validation epoch, collected on each rank for ``evaluate_pairs``.

    Rows stay on the rank that made them: torchmetrics neither synchronises nor gathers states,
    the exchanges inside ``evaluate_pairs`` do.

    Example:
        >>> evaluation = PairEvaluation()
        >>> features, ids = torch.eye(3), torch.arange(3)
        >>> evaluation.update(features, features, ids, ids, ids)
        >>> result = evaluation.compute(logit_scale=10.0, logit_bias=-5.0, global_batch_size=3)
        >>> result.metrics["text_to_image_median_rank"]
        1.0
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    image_features: list[Tensor]
    text_features: list[Tensor]
    image_ids: list[Tensor]
    text_ids: list[Tensor]
    sample_ids: list[Tensor]
    picture_ids: list[Tensor]

    def __init__(self) -> None:
        # No cache: compute takes arguments, and a cached result would ignore new ones.
        super().__init__(sync_on_compute=False, dist_sync_on_step=False, compute_with_cache=False)
        for name in _Rows._fields:
            self.add_state(name, default=[], dist_reduce_fx=None)

    def update(
        self,
        image_features: Tensor,
        text_features: Tensor,
        image_ids: Tensor,
        text_ids: Tensor,
        sample_ids: Tensor,
        valid: Tensor | None = None,
        picture_ids: Tensor | None = None,
    ) -> None:
        """Keep the valid rows of one batch of this rank; no communication.

        Args:
            image_features: (B, D), L2-normalised.
            text_features: (B, D), L2-normalised.
            image_ids: (B,) int64.
            text_ids: (B,) int64.
            sample_ids: (B,) int64.
            valid: (B,) bool, False for padding rows; None if all rows count.
            picture_ids: (B,) int64; None if no picture occurs twice.
        """
        pictures = sample_ids if picture_ids is None else picture_ids
        features = (widen_rows(image_features), widen_rows(text_features))
        rows = _Rows(*features, image_ids, text_ids, sample_ids, pictures)
        for name, column in zip(_Rows._fields, rows, strict=True):
            kept = column.detach() if valid is None else column.detach()[valid]
            # Apple's GPUs have no float64, which the similarities need.
            getattr(self, name).append(kept.cpu() if kept.device.type == "mps" else kept)

    def compute(self, **settings: Any) -> Evaluation:
        """Evaluate everything collected since the last ``reset``.

        Distributed contract: as ``evaluate_pairs``; every rank must call it.

        Args:
            **settings: the keyword arguments of ``evaluate_pairs``: ``logit_scale`` and
                ``logit_bias``, and the optional ones.
        """
        *rows, pictures = (torch.cat(getattr(self, name)) for name in _Rows._fields)
        return evaluate_pairs(*rows, picture_ids=pictures, **settings)


def _usable_rows(rows: _Rows, group: ProcessGroup | None) -> _Rows:
    """Check all rows on all ranks; drop repeated samples."""
    check_features(
        [("image_features", rows.image_features), ("text_features", rows.text_features)],
        [("image_ids", rows.image_ids), ("text_ids", rows.text_ids)],
        unit_norm=True,
        group=group,
    )
    problem = None
    if not rows.image_ids.shape == rows.text_ids.shape == rows.sample_ids.shape:
        problem = (
            f"pairs need one row each of images ({len(rows.image_ids)}), "
            f"texts ({len(rows.text_ids)}) and sample_ids ({len(rows.sample_ids)})"
        )
    elif rows.picture_ids.shape != rows.sample_ids.shape:
        problem = (
            f"picture_ids {tuple(rows.picture_ids.shape)} must be one for each of the "
            f"{len(rows.sample_ids)} pairs"
        )
    elif (unpaired := rows.image_ids != rows.text_ids).any():
        row = int(unpaired.nonzero()[0])
        problem = (
            f"row {row} is no pair: image_ids ({int(rows.image_ids[row])}) and text_ids "
            f"({int(rows.text_ids[row])}) must be equal; pass the caption's id for both"
        )
    raise_together(problem, device=rows.image_ids.device, group=group)
    keep = first_occurrences(rows.sample_ids, group=group)
    # Without repeats nothing is copied: the features may lie in a file.
    return rows if bool(keep.all()) else _Rows(*(column[keep] for column in rows))


def _kept(features: Tensor, mask: Tensor) -> Tensor:
    """Select rows by a mask; without a copy where it keeps all, as they may lie in a file."""
    return features if bool(mask.all()) else features[mask]


def _feature_arrays(
    rows: _Rows, array_pairs: int, group: ProcessGroup | None
) -> dict[str, np.ndarray]:
    (all_ids,) = gather_in_order([rows.sample_ids], rows.sample_ids, group=group)
    columns = {
        "image_features": rows.image_features,
        "text_features": rows.text_features,
        "sample_ids": rows.sample_ids,
        "caption_ids": rows.text_ids,
        "picture_ids": rows.picture_ids,
    }
    gathered = gather_in_order(
        list(columns.values()), rows.sample_ids, chosen=all_ids[:array_pairs], group=group
    )
    return {
        name: (column.float() if column.is_floating_point() else column).cpu().numpy()
        for name, column in zip(columns, gathered, strict=True)
    }
