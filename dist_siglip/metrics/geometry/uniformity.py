"""Uniformity of features on the sphere, within a modality and across."""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, prepare_exchange, sum_over_ranks
from dist_siglip.losses.arguments import DEFAULT_CHUNK_ROWS
from dist_siglip.metrics.checks import check_features
from dist_siglip.metrics.geometry.pair_statistics import PairStatistics
from dist_siglip.metrics.tiles import similarity, tile_slices


@torch.no_grad()
def uniformity(
    features: Tensor,
    *,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> float:
    """Log of the mean Gaussian kernel over all distinct rows; lower is more uniform.

        uniformity = log( mean_{i != j} exp(-2 |x_i - x_j|^2) )

    0 if all features are one point; -4 is reached in high dimension by rows that are orthogonal.

    Distributed contract: every rank passes its own rows (0 too); one exchange of the shards without
    gradient and one all-reduce. Every rank gets the same result.

    Args:
        features: (B, D), L2-normalised.
        chunk_rows: longest side of a live rectangle of similarities.
        exchange: how the rows reach the other ranks.
        group: process group.

    Returns:
        Mean over ordered pairs of distinct rows, in [-8, 0]; NaN for fewer than two rows.

    Raises:
        UserError: if features are not finite or not normalised (names row and rank).

    Example:
        >>> round(uniformity(torch.eye(5)), 6)
        -4.0

    Source:
        Wang and Isola 2020, arXiv:2005.10242, with t = 2 and distinct pairs as in the code,
        ssnl/align_uniform.
    """
    check_features([("features", features)], unit_norm=True, group=group)
    prepared = prepare_exchange([features], exchange=exchange, group=group, purpose="uniformity")
    total = torch.zeros((), dtype=torch.float64, device=features.device)

    def visit(owner: int, shard: tuple[Tensor, ...], _contributions: tuple[Tensor, ...]) -> None:
        (others,) = shard
        for rows, columns in tile_slices(len(features), len(others), chunk_rows):
            if owner == prepared.rank and columns.start < rows.start:
                continue  # the mirror image of a rectangle that counts twice
            cosines = similarity(features[rows], others[columns])
            row_squares = features[rows].double().square().sum(dim=1)
            column_squares = others[columns].double().square().sum(dim=1)
            squared = row_squares[:, None] + column_squares[None, :] - 2 * cosines
            kernel = (-2 * squared.clamp_min_(0)).exp_()
            if owner == prepared.rank and rows == columns:
                kernel.fill_diagonal_(0)
            twice = owner == prepared.rank and columns.start > rows.start
            total.add_(kernel.sum(), alpha=2 if twice else 1)

    prepared.run(visit)
    num_rows = prepared.total_rows
    if num_rows < 2:
        return math.nan
    return math.log(float(sum_over_ranks(total, group)) / (num_rows * (num_rows - 1)))


def cross_uniformity(statistics: PairStatistics) -> float:
    """Log of the mean Gaussian kernel over all images and texts of different pairs.

        cross_uniformity = log( mean_{i != j} exp(-2 |x_i - y_j|^2) )

    Lower is better spread: it falls as texts move away from the images of other pairs, and with it
    any overlap of the modalities. Equal captions of other pairs count, as in training.

    Args:
        statistics: of all pairs.

    Returns:
        Mean over ordered pairs i != j, in [-8, 0]; NaN for one pair.

    Example:
        >>> from dist_siglip.metrics.geometry.pair_statistics import collect_pair_statistics
        >>> features, ids = torch.eye(5), torch.arange(5)
        >>> statistics = collect_pair_statistics(
        ...     features, features, ids, ids, logit_scale=1.0, logit_bias=0.0
        ... )
        >>> round(cross_uniformity(statistics), 6)
        -4.0

    Source:
        Fahim et al. 2024, arXiv:2405.18570, code abrar-fahim/contrastive-gap (a mean, where the
        text prints a sum divided by N).
    """
    num_pairs = statistics.num_pairs
    if num_pairs < 2:
        return math.nan
    return math.log(statistics.other_kernel_sum / (num_pairs * (num_pairs - 1)))
