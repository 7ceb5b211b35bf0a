"""Recall, margin and gap of features cut to fewer dimensions, as they are and after a rotation.

The first columns of a model that was trained at prefixes (``losses.MatryoshkaLoss``) are meant to
do alone; of any other this is a plain cut. The rotation is the rival without training: eigenvectors
of the image features' second moment, largest first, applied to both sides. It keeps every cosine of
whole features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName
from dist_siglip.errors import UserError
from dist_siglip.metrics.geometry.gap import modality_gap
from dist_siglip.metrics.geometry.margins import constellation, quantile_constellation
from dist_siglip.metrics.geometry.pair_statistics import collect_pair_statistics
from dist_siglip.metrics.geometry.spread import collect_moments
from dist_siglip.metrics.retrieval.positives import DistinctItems
from dist_siglip.metrics.retrieval.ranks import recall_at_k, retrieval_ranks_both_ways
from dist_siglip.metrics.rows import gather_in_order

# Ways to fewer dimensions, as names of metrics begin: prefix_64_margin, pca_64_margin.
PREFIX_WAYS = ("prefix", "pca")


@torch.no_grad()
def pca_rotation(image_features: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """Eigenvectors of the second moment of all ranks' image features, largest eigenvalue first.

    Distributed contract: one all-reduce of (D + 1)^2 numbers; every rank gets the same result.

    Args:
        image_features: (B, D), finite; any number of rows.
        group: process group.

    Returns:
        (D, D) float64 on the CPU, orthonormal columns; the largest entry of each is positive.

    Example:
        >>> pca_rotation(torch.tensor([[0.0, 1.0], [0.6, 0.8]])).abs().argmax(dim=0)
        tensor([1, 0])
    """
    products = collect_moments(image_features, group=group).products
    vectors = torch.linalg.eigh(products).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * largest.sign()


def check_dim(dim: int, width: int) -> None:
    """Raise ``UserError`` unless a prefix of ``dim`` columns can be cut from features.

    Example:
        >>> check_dim(8, 8)
    """
    if not 1 <= dim <= width:
        raise UserError(
            f"dim ({dim}) must be 1 to {width}, the width of the features; no prefix is larger"
        )


def cut_rows(rows: Tensor, dim: int, rotation: Tensor | None = None) -> Tensor:
    """Return the first ``dim`` columns, rotated before if asked for, every row of length 1.

    Args:
        rows: (B, D).
        dim: at most D.
        rotation: (D, D), of ``pca_rotation``; None for none.

    Returns:
        (B, dim), float64 for float64 rows, else float32; a row of zeros becomes the first axis.

    Raises:
        UserError: if ``dim`` is below 1 or above D.

    Example:
        >>> cut_rows(torch.tensor([[3.0, 4.0, 12.0]]), 2)
        tensor([[0.6000, 0.8000]])
    """
    check_dim(dim, rows.shape[1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if rotation is not None:
        rows = rows @ rotation[:, :dim].to(rows)
    cut = rows[:, :dim].clone()
    cut[cut.norm(dim=1) == 0, 0] = 1
    return F.normalize(cut, dim=1)


@torch.no_grad()
def prefix_metrics(
    image_features: Tensor,
    text_features: Tensor,
    sample_ids: Tensor,
    items: DistinctItems,
    dims: Sequence[int],
    *,
    top_k: Sequence[int],
    chunk_rows: int | None,
    exchange: ExchangeName,
    group: ProcessGroup | None,
) -> dict[str, float]:
    """Metrics of every prefix, cut and rotated; names begin with ``prefix_64_`` and ``pca_64_``.

    The rotation is fitted to these images, which flatters it where they are not many times D.

    Distributed contract: that of ``evaluate_pairs``: three exchanges for each prefix and way.

    Args:
        image_features: (B, D), L2-normalised, each sample once over all ranks.
        text_features: (B, D), L2-normalised; row i belongs to image i.
        sample_ids: (B,) int64.
        items: pictures and captions of the rows.
        dims: columns of each prefix.
        top_k: the K of recall@K.
        chunk_rows: longest side of a live rectangle of similarities.
        exchange: how shards reach the other ranks.
        group: process group.

    Returns:
        ``image_to_text_recall@K``, ``text_to_image_recall@K``, ``margin``, ``relative_bias``,
        ``margin_5_95``, ``relative_bias_5_95`` and ``modality_gap`` of each.

    Raises:
        UserError: if a prefix is larger than D.
    """
    rotation = pca_rotation(image_features, group=group) if dims else None
    metrics: dict[str, float] = {}
    for dim in dims:
        for way in PREFIX_WAYS:
            turned = rotation if way == "pca" else None
            images = cut_rows(image_features, dim, turned)
            texts = cut_rows(text_features, dim, turned)
            statistics = collect_pair_statistics(
                images,
                texts,
                items.image_ids,
                items.text_ids,
                positives=items.positives,
                logit_scale=1.0,  # margins are of cosines
                logit_bias=0.0,
                chunk_rows=chunk_rows,
                exchange=exchange,
                group=group,
            )
            both = retrieval_ranks_both_ways(
                images[items.images],
                texts[items.texts],
                items.image_ids[items.images],
                items.text_ids[items.texts],
                positives=items.positives,
                chunk_rows=chunk_rows,
                exchange=exchange,
                group=group,
            )
            ranks = gather_in_order(
                list(items.of_all_rows(*both, group=group)), sample_ids, group=group
            )
            found: dict[str, float] = {}
            for direction, all_ranks, gallery in (
                ("image_to_text", ranks[0], items.num_texts),
                ("text_to_image", ranks[1], items.num_images),
            ):
                for k in top_k:
                    recall = recall_at_k(all_ranks, k, gallery_size=gallery)
                    found[f"{direction}_recall@{k}"] = recall
            for suffix, threshold in (
                ("", constellation(statistics)),
                ("_5_95", quantile_constellation(statistics, 0.05)),
            ):
                found[f"margin{suffix}"] = threshold.margin
                found[f"relative_bias{suffix}"] = threshold.relative_bias
            found["modality_gap"] = modality_gap(images, texts, group=group).centroid_distance
            metrics |= {f"{way}_{dim}_{name}": value for name, value in found.items()}
    return metrics
