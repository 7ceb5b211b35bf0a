"""Spread of features on the sphere: uniformity, effective rank and principal components.

Rank and components follow from one (D, D) sum over rows, whatever their number; it is made in
parts, so that the features may lie in a file.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, prepare_exchange, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.metrics.geometry.pair_statistics import PairStatistics
from dist_siglip.metrics.rows import check_features
from dist_siglip.metrics.tiles import exact_similarity, row_slices, tile_side, tile_slices

# Eigenvalues of sums of products are known up to this share of the largest.
_ROUNDING = 1e-14


@torch.no_grad()
def uniformity(
    features: Tensor,
    *,
    chunk_rows: int | None = None,
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
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
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
    side = tile_side(chunk_rows, features.device)
    prepared = prepare_exchange([features], exchange=exchange, group=group, purpose="uniformity")
    total = torch.zeros((), dtype=torch.float64, device=features.device)

    def visit(owner: int, shard: tuple[Tensor, ...], _contributions: tuple[Tensor, ...]) -> None:
        (others,) = shard
        for rows, columns in tile_slices(len(features), len(others), side):
            if owner == prepared.rank and columns.start < rows.start:
                continue  # the mirror image of a rectangle that counts twice
            cosines = exact_similarity(features[rows], others[columns])
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


class Moments(NamedTuple):
    """Sums over the rows of all ranks, on the CPU.

    Attributes:
        num_rows: N.
        total: (D,) float64, sum of the rows.
        products: (D, D) float64, sum of x x^T.
    """

    num_rows: int
    total: Tensor
    products: Tensor


@torch.no_grad()
def collect_moments(features: Tensor, *, group: ProcessGroup | None = None) -> Moments:
    """Sum rows and their outer products over all ranks.

    Distributed contract: every rank passes its own rows, any number of them; one all-reduce of
    (D + 1)^2 numbers. Every rank gets the same result.

    Args:
        features: (B, D), finite.
        group: process group.

    Raises:
        UserError: if features are not finite; on every rank.

    Example:
        >>> collect_moments(torch.eye(2)).products
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    check_features([("features", features)], unit_norm=False, group=group)
    width = features.shape[1]
    # A further feature that is 1 everywhere brings the sum and the count along.
    sums = features.new_zeros((width + 1, width + 1), dtype=torch.float64)
    for part in row_slices(len(features)):
        rows = torch.nn.functional.pad(features[part].double(), (0, 1), value=1.0)
        sums.addmm_(rows.T, rows)
    sums = sum_over_ranks(sums, group).cpu()
    return Moments(int(sums[width, width]), sums[width, :width], sums[:width, :width])


@torch.no_grad()
def effective_rank(features: Tensor, *, group: ProcessGroup | None = None) -> float:
    """Exponential of the entropy of the normalised singular values of all ranks' features.

        p_k = s_k / sum_j s_j        effective rank = exp(-sum_k p_k log p_k)

    with s_k the singular values of the (N, D) matrix of features, which are not centred. It is
    between 1 (all on one line) and min(N, D); a model that collapses loses it.

    Distributed contract: every rank passes its own rows, any number of them; the result is that of
    all rows and equal on every rank. One all-reduce of (D + 1, D + 1).

    Args:
        features: (B, D), finite.
        group: process group.

    Raises:
        UserError: if features are not finite; on every rank.

    Example:
        >>> round(effective_rank(torch.eye(3)), 6), round(effective_rank(torch.ones(3, 2)), 6)
        (3.0, 1.0)

    Source:
        Roy and Vetterli 2007, "The effective rank"; Garrido et al. 2023, arXiv:2210.02885,
        equation 1 (RankMe), without its epsilon.
    """
    return rank_of_moments(collect_moments(features, group=group))


def rank_of_moments(moments: Moments) -> float:
    """Effective rank of rows, from their moments; see ``effective_rank``."""
    # N rows have at most N singular values above 0; the root of what rounding makes of the others
    # would count, thousands of them by 1e-8 each.
    squares = torch.linalg.eigvalsh(moments.products)[-max(moments.num_rows, 1) :]
    is_there = squares > _ROUNDING * squares[-1]
    singular = torch.where(is_there, squares, 0).sqrt()
    shares = singular / singular.sum()
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


def explained_variance_ratios(moments: Moments) -> Tensor:
    """Share of the variance in every principal component, largest first.

        eigenvalues of sum_i (x_i - mean x) (x_i - mean x)^T, divided by their sum

    Args:
        moments: of all rows.

    Returns:
        (D,) float64, adding up to 1; NaN without any variance.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> explained_variance_ratios(collect_moments(rows)).tolist()
        [0.8, 0.2]

    Source:
        Fahim et al. 2024, arXiv:2405.18570: ``explained_variance_ratio_`` of scikit-learn's PCA.
    """
    mean = moments.total / max(1, moments.num_rows)
    scatter = moments.products - torch.outer(moments.total, mean)
    variances = torch.linalg.eigvalsh(scatter).flip(0).clamp_min(0)
    total = variances.sum()
    # What rounding leaves of rows that are all one point is no variance.
    if not total > 1e-12 * moments.products.trace():
        return torch.full_like(variances, math.nan)
    return variances / total


def components_for(ratios: Tensor, share: float) -> float:
    """Fewest principal components that hold a share of the variance.

    Args:
        ratios: (D,) of ``explained_variance_ratios``.
        share: in (0, 1].

    Returns:
        A whole number from 1 to D; NaN without any variance.

    Raises:
        UserError: if the share is outside of (0, 1].

    Example:
        >>> components_for(torch.tensor([0.7, 0.2, 0.1]), 0.8)
        2.0
    """
    if not 0 < share <= 1:
        raise UserError(f"share ({share}) of the variance must be in (0, 1]; try 0.8")
    if ratios.isnan().any():
        return math.nan
    # Sums of shares may miss a round number by a rounding.
    reached = ratios.cumsum(0) >= share - 1e-12
    return float(len(ratios) - int(reached.sum()) + 1)
