"""Matched features: every matching tried, cases by hand, chance, and what is left out."""

import math

import pytest
import torch

from dist_siglip.lab.sparse_features import match_features
from tests.support import reference_representations as reference


def codes(count=40, width=5, density=0.3):
    values = torch.rand(count, width, dtype=torch.float64)
    return values * (torch.rand(count, width) < density)


def match(first, second, **options):
    return match_features([(first, second)], keep_common=True, **options)


def test_the_matching_is_the_best_of_all():
    first, second = codes(), codes(width=6)
    found = match(first, second)
    assert found.weighted == pytest.approx(reference.matched_correlation(first, second), abs=1e-12)
    active = (first > 0).double(), (second > 0).double()
    assert found.binary == pytest.approx(reference.matched_correlation(*active), abs=1e-12)
    assert found[2:] == (5, 6)


def test_a_case_counted_by_hand():
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    # Affinity: [[0, 3], [2, 2]]; crosswise 3 + 2, straight 0 + 2; norms sqrt(5) and sqrt(11).
    assert match(first, second).weighted == pytest.approx(5 / math.sqrt(55))
    # Binary: [[0, 1], [1, 1]], crosswise 2; norms sqrt(2) and sqrt(3).
    assert match(first, second).binary == pytest.approx(2 / math.sqrt(6))


def test_order_of_features_and_a_factor_change_nothing():
    first = codes()
    assert match(first, 3 * first[:, torch.randperm(5)]).weighted == pytest.approx(1, abs=1e-12)


def test_rows_in_parts_are_rows_at_once():
    first, second = codes(), codes(width=4)
    parts = zip(first.split(13), second.split(13), strict=True)
    assert match_features(parts, keep_common=True) == pytest.approx(match(first, second))


def test_shuffled_rows_match_less():
    first = codes(400, 20, 0.05)
    shuffled = first[torch.randperm(400)]
    assert match(first, shuffled).weighted < 0.3


def test_features_that_are_common_or_never_active_are_left_out():
    first = codes(200, 4, 0.05)
    first[:, 0] = 1  # always active
    first[:, 1] = 0
    found = match_features([(first, first)])
    assert found.first_features == 2
    assert found.weighted == pytest.approx(1, abs=1e-12)
    # With it, the one that is always active would decide everything.
    shuffled = first[torch.randperm(200)]
    assert match(first, shuffled).weighted > 0.8
    assert match_features([(first, shuffled)]).weighted < 0.5


def test_a_side_without_features_has_no_value():
    assert math.isnan(match(codes(), torch.zeros(40, 3)).weighted)
