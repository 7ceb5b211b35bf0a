"""Separability of images and texts by a plane.

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
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.metrics.checks import check_features
from dist_siglip.metrics.rows import gather_sample
from dist_siglip.metrics.tiles import row_slices

# Most pairs to fit, which bounds memory and time.
SEPARABILITY_PAIRS = 5000
_TEST_FRACTION = 0.2
# A row on the wrong side costs more than a flat direction saves, down to margins of about 0.01.
_PENALTY = 100.0
# Modalities that overlap in few directions would take minutes to fit to the last digit.
_TOLERANCE, _MAX_ITERATIONS = 1e-2, 20


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
