"""Modality gap: distances between images and texts, and their separability by a plane.

Pairs within one modality are not visited: for N rows x of norm one,

    sum_{i != j} <x_i, x_j> = |sum_i x_i|^2 - sum_i |x_i|^2

so one all-reduce of 2 D + 6 float64 numbers serves all distances that are linear in the inner
product.

``linear_separability`` is the accuracy of a plane on unseen pairs: 0.5 where the modalities
overlap, 1.0 where they lie in disjoint regions, as contrastive training usually leaves them.

``separating_direction`` fits a plane through the origin and counts the rows on either side. If a
threshold of 0 separates positive from negative pairs (margin > |relative bias|), a plane has all
images on one side and all texts but D on the other: the modality gap is no accident then.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.metrics.rows import check_features, gather_sample
from dist_siglip.metrics.tiles import row_slices

# Most pairs to fit, which bounds memory and time.
SEPARABILITY_PAIRS = 5000
_TEST_FRACTION = 0.2
# A row on the wrong side costs more than a flat direction saves, down to margins of about 0.01.
_PENALTY = 100.0
# Modalities that overlap in few directions would take minutes to fit to the last digit.
_TOLERANCE, _MAX_ITERATIONS = 1e-2, 20
# Below this a mean distance is rounding, and a ratio of two of them says nothing.
_NO_DISTANCE = 1e-12


@torch.no_grad()
def linear_separability(
    image_features: Tensor,
    text_features: Tensor,
    sample_ids: Tensor,
    *,
    max_pairs: int = SEPARABILITY_PAIRS,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> float:
    """Accuracy of logistic regression that tells images (0) from texts (1) on unseen pairs.

    Pairs are sorted by sample id and shuffled with ``seed``; the first ``max_pairs`` are used, 80 %
    for fitting and 20 % for the accuracy, so both sides of a pair are on the same side of
    the split.

    Distributed contract: every rank passes its own pairs (0 too); the chosen pairs are gathered
    on every rank, which fits on its own and gets the same result. The result does not depend on
    how pairs are distributed.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised; row i belongs to image i.
        sample_ids: (B,) int64, each once over all ranks.
        max_pairs: most pairs to use, at least 2.
        seed: of the choice and the split.
        group: process group.

    Returns:
        Accuracy in [0, 1] on the test pairs; NaN for fewer than two pairs.

    Raises:
        UserError: if ``max_pairs`` is below 2 or features are unusable (names row and rank).

    Example:
        >>> images = torch.tensor([[1.0, 0.0]]).repeat(10, 1)
        >>> linear_separability(images, -images, torch.arange(10))
        1.0

    Source:
        Fahim et al. 2024, arXiv:2405.18570, code abrar-fahim/contrastive-gap (scikit-learn
        defaults).
    """
    sides = (image_features, text_features)
    images, texts = _choose_pairs(sides, sample_ids, max_pairs, seed, group, least=2)
    num_pairs = len(images)
    if num_pairs < 2:
        return math.nan
    pairs = np.stack([images.float().numpy(), texts.float().numpy()])
    num_test = max(1, round(_TEST_FRACTION * num_pairs))
    return _fit_and_score(pairs[:, num_test:], pairs[:, :num_test])


class SeparatingDirection(NamedTuple):
    """Normal h of a plane through the origin, and the rows on either side of it.

    Attributes:
        direction: (D,) float64 of length 1, on the CPU.
        num_pairs: N, pairs of all ranks.
        images_above: images x with <h, x> > 0.
        texts_below: texts y with <h, y> < 0.
    """

    direction: Tensor
    num_pairs: int
    images_above: int
    texts_below: int

    @property
    def separates(self) -> bool:
        """Whether every row is on its side."""
        return self.images_above == self.texts_below == self.num_pairs


@torch.no_grad()
def separating_direction(
    image_features: Tensor,
    text_features: Tensor,
    sample_ids: Tensor,
    *,
    max_pairs: int = SEPARABILITY_PAIRS,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> SeparatingDirection:
    """Fit a linear support vector machine without intercept, and count both sides.

    It is fitted to the pairs that ``linear_separability`` chooses, with images above; counted are
    the pairs of all ranks.

    Distributed contract: as ``linear_separability``, and one all-reduce of three counts.

    Args:
        image_features: as of ``linear_separability``.
        text_features: likewise.
        sample_ids: likewise.
        max_pairs: most pairs to fit, at least 1.
        seed: of the choice.
        group: process group.

    Raises:
        UserError: if ``max_pairs`` is below 1, no rank has any pair, or features are unusable
            (names row and rank); on every rank.

    Example:
        >>> images = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
        >>> found = separating_direction(images, -images, torch.arange(2))
        >>> found.images_above, found.texts_below, found.separates
        (2, 2, True)

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Theorem 3.6.
    """
    sides = (image_features, text_features)
    images, texts = _choose_pairs(sides, sample_ids, max_pairs, seed, group, least=1)
    if not len(images):
        raise UserError("no rank has any pair to evaluate; check the validation data")
    direction = _fit_direction(images.double().numpy(), texts.double().numpy())
    counts = torch.zeros(3, dtype=torch.int64, device=image_features.device)
    on_device = direction.to(image_features.device)
    for rows in row_slices(len(image_features)):
        above = (image_features[rows].double() @ on_device > 0).sum()
        below = (text_features[rows].double() @ on_device < 0).sum()
        counts += torch.stack([above.new_tensor(len(image_features[rows])), above, below])
    return SeparatingDirection(direction, *sum_over_ranks(counts, group).tolist())


def _choose_pairs(
    sides: tuple[Tensor, Tensor],
    sample_ids: Tensor,
    max_pairs: int,
    seed: int,
    group: ProcessGroup | None,
    *,
    least: int,
) -> tuple[Tensor, ...]:
    """Check images and texts, and gather randomly chosen pairs of all ranks on the CPU."""
    if max_pairs < least:
        raise UserError(
            f"max_pairs ({max_pairs}) must be at least {least}; try {SEPARABILITY_PAIRS}"
        )
    check_features(
        list(zip(("image_features", "text_features"), sides, strict=True)),
        [("sample_ids", sample_ids), ("sample_ids", sample_ids)],
        unit_norm=True,
        group=group,
    )
    return gather_sample(sides, sample_ids, max_rows=max_pairs, seed=seed, group=group)


def _fit_and_score(train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy on ``test``; both are (2, pairs, D), images first."""
    model = LogisticRegression()
    with warnings.catch_warnings():
        # Its default of 100 iterations is part of the definition, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train.reshape(-1, train.shape[2]), np.repeat([0, 1], train.shape[1]))
    return float(model.score(test.reshape(-1, test.shape[2]), np.repeat([0, 1], test.shape[1])))


def _fit_direction(images: np.ndarray, texts: np.ndarray) -> Tensor:
    """Direction of unit length with images above."""
    rows = np.concatenate([images, texts])
    labels = np.repeat([1, -1], [len(images), len(texts)])
    # The primal problem: its time does not grow with the penalty.
    model = LinearSVC(
        C=_PENALTY, fit_intercept=False, dual=False, tol=_TOLERANCE, max_iter=_MAX_ITERATIONS
    )
    with warnings.catch_warnings():
        # Modalities that overlap need not converge; the rows are counted anyway.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows, labels)
    direction = torch.from_numpy(model.coef_[0])
    return direction / direction.norm().clamp_min(torch.finfo(torch.float64).tiny)


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
