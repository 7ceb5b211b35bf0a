"""Can a plane tell images from texts?

0.5: the modalities overlap; 1.0: they lie in disjoint regions, which is what contrastive
training usually leaves.
"""

import math
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.errors import UserError
from dist_siglip.metrics.checks import check_features
from dist_siglip.metrics.rows import gather_sample

_TEST_FRACTION = 0.2


@torch.no_grad()
def linear_separability(
    image_features: Tensor,
    text_features: Tensor,
    sample_ids: Tensor,
    *,
    max_pairs: int = 5000,
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
        max_pairs: most pairs to use, at least 2; bounds memory and time.
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
    if max_pairs < 2:
        raise UserError(f"max_pairs ({max_pairs}) must be at least 2; try 5000")
    check_features(
        [("image_features", image_features), ("text_features", text_features)],
        [("sample_ids", sample_ids), ("sample_ids", sample_ids)],
        unit_norm=True,
        group=group,
    )
    images, texts = gather_sample(
        [image_features, text_features], sample_ids, max_rows=max_pairs, seed=seed, group=group
    )
    num_pairs = len(images)
    if num_pairs < 2:
        return math.nan
    pairs = np.stack([images.float().numpy(), texts.float().numpy()])
    num_test = max(1, round(_TEST_FRACTION * num_pairs))
    return _fit_and_score(pairs[:, num_test:], pairs[:, :num_test])


def _fit_and_score(train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy on ``test``; both are (2, pairs, D), images first."""
    model = LogisticRegression()
    with warnings.catch_warnings():
        # Its default of 100 iterations is part of the definition, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train.reshape(-1, train.shape[2]), np.repeat([0, 1], train.shape[1]))
    return float(model.score(test.reshape(-1, test.shape[2]), np.repeat([0, 1], test.shape[1])))
