"""Linear separability: closed forms, a by-hand scikit-learn run, and its bounds."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from dist_siglip.errors import UserError
from dist_siglip.metrics import linear_separability


def _cloud(count, dim=8):
    return F.normalize(torch.randn(count, dim), dim=1)


def test_identical_clouds_cannot_be_told_apart():
    cloud = _cloud(200)
    assert linear_separability(cloud, cloud, torch.arange(200)) == 0.5


def test_opposite_cones_are_fully_separable():
    cone = F.normalize(torch.eye(8)[0] + 0.1 * torch.randn(100, 8), dim=1)
    assert linear_separability(cone, -cone, torch.arange(100)) == 1.0


def test_matches_scikit_learn_on_the_same_split():
    images, texts = _cloud(50), F.normalize(_cloud(50) + 0.1, dim=1)
    order = np.random.default_rng(3).permutation(50)
    test, train = order[:10], order[10:]
    labels = np.array([0] * 40 + [1] * 40)
    model = LogisticRegression().fit(np.concatenate([images[train], texts[train]]), labels)
    right = (model.predict(images[test]) == 0).sum() + (model.predict(texts[test]) == 1).sum()
    assert linear_separability(images, texts, torch.arange(50), seed=3) == right / 20
    assert 0.5 < right / 20 < 1


def test_order_of_rows_does_not_matter():
    images, texts = _cloud(60), F.normalize(_cloud(60) + 0.3, dim=1)
    order = torch.randperm(60)
    there = linear_separability(images, texts, torch.arange(60))
    assert there == linear_separability(images[order], texts[order], order)


def test_number_of_pairs_is_capped(monkeypatch):
    from dist_siglip.metrics.geometry import gap as separability

    shapes = []
    monkeypatch.setattr(
        separability,
        "_fit_and_score",
        lambda train, test: shapes.append((train.shape, test.shape)) or 0.0,
    )
    linear_separability(_cloud(90), _cloud(90), torch.arange(90), max_pairs=20)
    assert shapes == [((2, 16, 8), (2, 4, 8))]


def test_one_pair_has_no_separability_and_too_small_a_cap_is_refused():
    assert math.isnan(linear_separability(_cloud(1), _cloud(1), torch.arange(1)))
    with pytest.raises(UserError, match=r"max_pairs \(1\)"):
        linear_separability(_cloud(4), _cloud(4), torch.arange(4), max_pairs=1)
