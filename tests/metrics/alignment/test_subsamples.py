"""Random parts and shuffled rows: mean, deviation, chance."""

import math

import numpy as np
import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.metrics.alignment import (
    center_normalize,
    estimate_alignment,
    mean_direction,
    measure_alignment,
)


def pair(count=120):
    first = torch.randn(count, 12) + 0.5
    return first, first @ torch.randn(12, 7) + 0.5 * torch.randn(count, 7)


def test_mean_and_deviation_are_over_the_parts_that_were_drawn():
    first, second = pair()
    estimate = estimate_alignment(first, second, num_rows=40, num_parts=3, k=4, seed=5)
    parts = []
    for part in range(3):
        rows = np.sort(np.random.default_rng([5, part]).choice(120, 40, replace=False))
        parts.append(measure_alignment(first[rows].double(), second[rows].double(), k=4))
    assert estimate.mean == pytest.approx(np.mean(parts, axis=0), rel=1e-12)
    assert estimate.deviation == pytest.approx(np.std(parts, axis=0, ddof=1), rel=1e-9)
    assert (estimate.num_rows, estimate.num_parts) == (40, 3)


def test_shuffled_rows_agree_by_chance_only():
    estimate = estimate_alignment(*pair(400), num_rows=200, num_parts=4, k=10)
    assert estimate.mean.mutual_knn > 0.2
    assert estimate.chance_mean.mutual_knn == pytest.approx(10 / 199, abs=0.015)
    assert abs(estimate.chance_mean.unbiased_cka) < 0.02
    # Biased measures are above zero by chance.
    assert estimate.chance_mean.svcca > 0.05


def test_parts_are_centred_on_the_mean_of_all_rows():
    first, second = pair()
    sides = [center_normalize(side, mean_direction(side)) for side in (first, second)]
    expected = estimate_alignment(*sides, num_rows=40, num_parts=2, k=4)
    ours = estimate_alignment(first, second, center=True, num_rows=40, num_parts=2, k=4)
    assert ours.mean == pytest.approx(expected.mean, rel=1e-9)
    raw = estimate_alignment(first, second, num_rows=40, num_parts=2, k=4)
    assert abs(raw.mean.mutual_knn - ours.mean.mutual_knn) > 0.005


def test_equal_seeds_give_equal_estimates_and_others_do_not():
    sides = pair()
    there = estimate_alignment(*sides, num_rows=30, num_parts=2, k=3)
    assert estimate_alignment(*sides, num_rows=30, num_parts=2, k=3) == there
    assert estimate_alignment(*sides, num_rows=30, num_parts=2, k=3, seed=1) != there


def test_all_rows_are_taken_if_there_are_not_more():
    first, second = pair(30)
    estimate = estimate_alignment(first, second, num_parts=1, k=5)
    assert estimate.num_rows == 30
    expected = measure_alignment(first.double(), second.double(), k=5)
    assert estimate.mean == pytest.approx(expected, rel=1e-12)
    assert all(math.isnan(value) for value in estimate.deviation)


def test_no_part_is_refused():
    with pytest.raises(UserError, match=r"num_parts \(0\) must be at least 1; try 10"):
        estimate_alignment(*pair(), num_parts=0)
