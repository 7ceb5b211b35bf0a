"""Margin and relative bias of constructed configurations."""

import math

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics import collect_pair_statistics, constellation, quantile_constellation


def _statistics(images, texts, ids=None):
    ids = torch.arange(len(images)) if ids is None else ids
    return collect_pair_statistics(images, texts, ids, ids, logit_scale=1.0, logit_bias=0.0)


def _construction(points, delta, phi):
    """Construction 1 of Bangachev et al.: images and texts from one configuration."""
    rest = math.sqrt(1 - delta**2 - phi**2)
    ones = torch.ones(len(points), 1, dtype=points.dtype)
    images = torch.cat([delta * points, phi * ones, rest * ones], dim=1)
    texts = torch.cat([delta * points, phi * ones, -rest * ones], dim=1)
    return images, texts


@pytest.mark.parametrize(("delta", "phi"), [(1.0, 0.0), (0.8, 0.0), (0.7, 0.5), (0.5, 0.3)])
def test_margin_and_bias_of_construction_one(delta, phi):
    # A simplex of 6 points: inner products -1/5, so margin 0.6 and relative bias 0.4.
    points = torch.eye(6, dtype=torch.float64) - 1 / 6
    points = F.normalize(points, dim=1)
    result = constellation(_statistics(*_construction(points, delta, phi)))
    assert result.margin == pytest.approx(delta**2 * 0.6, abs=1e-12)
    expected_bias = delta**2 * 0.4 + phi**2 - (1 - delta**2 - phi**2)
    assert result.relative_bias == pytest.approx(expected_bias, abs=1e-12)


def test_margin_is_the_half_gap():
    result = constellation(_statistics(torch.eye(3), torch.eye(3)))
    assert result == (0.5, 0.5, 1.0, 0.0)


def test_overlapping_kinds_have_negative_margin():
    result = constellation(_statistics(torch.eye(2), torch.eye(2).flip(0)))
    assert result.margin == -0.5


def test_bounds_of_theorem_3_4_hold():
    images = F.normalize(torch.randn(30, 6), dim=1)
    result = constellation(_statistics(images, images))
    assert result.margin > 0
    assert result.margin + result.relative_bias <= 1 + 1e-6
    assert (3 - 4 / 30) * result.margin <= 1 + result.relative_bias + 1e-6


def test_equal_captions_are_not_negatives():
    points = torch.eye(3)[[0, 1, 2, 2]]
    assert constellation(_statistics(points, points)).margin == 0.0
    ids = torch.tensor([0, 1, 2, 2])
    assert constellation(_statistics(points, points, ids)).margin == 0.5


def test_quantiles_leave_the_worst_pairs_aside():
    # 100 orthogonal pairs of which 3 point at a text of another pair.
    images, texts = torch.eye(100), torch.eye(100)
    images[:3] = images[3:6]
    statistics = _statistics(images, texts)
    assert constellation(statistics).margin == -0.5
    lenient = quantile_constellation(statistics)
    assert lenient.margin == pytest.approx(0.5, abs=2e-4)
    assert lenient.relative_bias == pytest.approx(0.5, abs=2e-4)


def test_without_negatives_there_is_no_margin():
    points = torch.eye(2)
    assert math.isnan(constellation(_statistics(points, points, torch.tensor([5, 5]))).margin)


@pytest.mark.parametrize("fraction", [-0.1, 0.6])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(UserError, match="fraction"):
        quantile_constellation(_statistics(torch.eye(2), torch.eye(2)), fraction)
