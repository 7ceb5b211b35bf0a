"""Modality gap: distances between images and texts that follow from sums over rows.

Pairs within one modality are not visited: for N rows x of norm one,

    sum_{i != j} <x_i, x_j> = |sum_i x_i|^2 - sum_i |x_i|^2

so one all-reduce of 2 D + 6 float64 numbers serves all of these. Distances between all pairs
that are not linear in the inner product (uniformity) are in ``uniformity``.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.metrics.checks import check_features
from dist_siglip.metrics.tiles import row_slices

# Below this a mean distance is rounding, and a ratio of two of them says nothing.
_NO_DISTANCE = 1e-12


class ModalityGap(NamedTuple):
    """The gap family over N pairs (x_i, y_i); cos is the cosine and d = (1 - cos) / 2.

    Attributes:
        centroid_distance: |mean x - mean y|, "L2M", in [0, 2].
        relative_modality_gap: "RMG" in [0, 1]: mean_i d(x_i, y_i) / (mean_i d(x_i, y_i) +
            (mean_{i != j} d(x_i, x_j) + mean_{i != j} d(y_i, y_j)) / 2). NaN for fewer than two
            pairs, or if all features are one point.
        mean_pair_distance: mean_i |x_i - y_i|, "L2I", in [0, 2].
        alignment: mean_i |x_i - y_i|^2, in [0, 4]; 0 is perfect.
        positive_cosine: mean_i cos(x_i, y_i).
        image_cosine: mean_{i != j} cos(x_i, x_j), the width of the image cone; NaN for one pair.
        text_cosine: the same for texts.
        image_resultant_length: |mean x| in [0, 1], how much of an image all images share.
        text_resultant_length: the same for texts.
        xi: mean_i |(x_i - y_i) - (mean x - mean y)|^2, in [0, 4]: 0 if texts are images moved by
            one vector, which is what a linear representation of the modality means.
        xi_unsquared: mean_i |x_i - y_i| - |mean x - mean y|.
    """

    centroid_distance: float
    relative_modality_gap: float
    mean_pair_distance: float
    alignment: float
    positive_cosine: float
    image_cosine: float
    text_cosine: float
    image_resultant_length: float
    text_resultant_length: float
    xi: float
    xi_unsquared: float


@torch.no_grad()
def modality_gap(
    image_features: Tensor, text_features: Tensor, *, group: ProcessGroup | None = None
) -> ModalityGap:
    """Measure the gap between the images and texts of all ranks.

    Every row is one pair; where an image or a caption occurs in several rows, it counts as often.
    Rows are normalised again in float64, so that the rounding of their dtype is no distance.

    Distributed contract: every rank passes its own pairs (0 too); a few small gathers and one
    all-reduce of 2 D + 6 numbers. Every rank gets the same result.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised; row i belongs to image i.
        group: process group.

    Raises:
        UserError: if features are not finite or not normalised (names row and rank), numbers
            of rows differ, or no rank has any pair; on every rank.

    Example:
        >>> images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> gap = modality_gap(images, -images)
        >>> gap.centroid_distance, gap.relative_modality_gap, gap.alignment
        (2.0, 1.0, 4.0)

    Source:
        Liang et al. 2022, arXiv:2203.02053 (centroid distance); Schrodi et al. 2025,
        arXiv:2404.07983, code lmb-freiburg/two-effects-one-trigger (L2I, RMG); Wang and Isola
        2020, arXiv:2005.10242 (alignment, alpha = 2); Bangachev et al. 2025, arXiv:2509.18552,
        Table 4 (xi) and the notebook beside it (unsquared).
    """
    check_features(
        [("image_features", image_features), ("text_features", text_features)],
        unit_norm=True,
        paired=True,
        group=group,
    )
    num_features = image_features.shape[1]
    sums = image_features.new_zeros(6 + 2 * num_features, dtype=torch.float64)
    for rows in row_slices(len(image_features)):
        # Of length 1 to the last digit: else rows that are one point would not be at distance 0.
        images, texts = (
            F.normalize(side[rows].double(), dim=1) for side in (image_features, text_features)
        )
        sums += _sum_pairs(images, texts)
    sums = sum_over_ranks(sums, group).cpu()
    count, cosine, squared, distance, image_squares, text_squares = sums[:6].tolist()
    if count == 0:
        raise UserError("no rank has any pair to evaluate; check the validation data")
    image_sum, text_sum = sums[6:].chunk(2)
    image_cosine = _cosine_within(image_sum, image_squares, count)
    text_cosine = _cosine_within(text_sum, text_squares, count)
    centroid_distance = float((image_sum - text_sum).norm()) / count
    return ModalityGap(
        centroid_distance=centroid_distance,
        relative_modality_gap=_relative_gap(squared / count / 4, image_cosine, text_cosine),
        mean_pair_distance=distance / count,
        alignment=squared / count,
        positive_cosine=cosine / count,
        image_cosine=image_cosine,
        text_cosine=text_cosine,
        image_resultant_length=float(image_sum.norm()) / count,
        text_resultant_length=float(text_sum.norm()) / count,
        # sum |d - mean d|^2 = sum |d|^2 - |sum d|^2 / N; rounding may leave it below 0.
        xi=max(0.0, squared / count - centroid_distance**2),
        xi_unsquared=distance / count - centroid_distance,
    )


def _sum_pairs(images: Tensor, texts: Tensor) -> Tensor:
    """Six numbers and two vectors that add up over parts and ranks."""
    squared_distances = (images - texts).square().sum(dim=1)
    numbers = torch.stack(
        [
            torch.full_like(squared_distances, 1.0).sum(),
            (images * texts).sum(),
            squared_distances.sum(),
            squared_distances.sqrt().sum(),
            images.square().sum(),
            texts.square().sum(),
        ]
    )
    return torch.cat([numbers, images.sum(dim=0), texts.sum(dim=0)])


def _cosine_within(total: Tensor, squares: float, count: float) -> float:
    """Mean cosine over distinct rows; see the identity in the module docstring."""
    if count < 2:
        return math.nan
    return (float(total.square().sum()) - squares) / (count * (count - 1))


def _relative_gap(across: float, image_cosine: float, text_cosine: float) -> float:
    """RMG; ``across`` is mean d(x_i, y_i), which for unit vectors is |x - y|^2 / 4."""
    within = ((1 - image_cosine) / 2 + (1 - text_cosine) / 2) / 2
    if math.isnan(within) or across + within < _NO_DISTANCE:
        return math.nan
    return across / (across + max(0.0, within))
