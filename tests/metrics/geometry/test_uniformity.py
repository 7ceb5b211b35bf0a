"""Uniformity: plain loop, closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.metrics import uniformity
from tests.support import metric_reference


@pytest.mark.parametrize("chunk_rows", [1, 4, 1024])
def test_matches_the_plain_loop(chunk_rows):
    rows = F.normalize(torch.randn(11, 3), dim=1)
    expected = metric_reference.uniformity(rows)
    assert uniformity(rows, chunk_rows=chunk_rows) == pytest.approx(expected, rel=1e-12)


def test_one_point_is_zero():
    assert uniformity(torch.tensor([[0.6, 0.8]]).repeat(7, 1)) == pytest.approx(0, abs=1e-6)


def test_uniform_sphere_in_high_dimension_tends_to_minus_four():
    rows = F.normalize(torch.randn(600, 512), dim=1)
    assert uniformity(rows) == pytest.approx(-4, abs=0.05)


def test_two_antipodal_points_count_distinct_pairs_only():
    # With the diagonal the value would be log((1 + exp(-8)) / 2).
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)


def test_fewer_than_two_rows_have_no_uniformity():
    assert math.isnan(uniformity(torch.eye(1)))
