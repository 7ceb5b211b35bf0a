"""Centring and normalising by the mean of the whole data set."""

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.metrics.alignment import center_normalize, mean_direction
from tests.support import reference_representations as reference


def cone(count=30):
    return torch.randn(count, 5, dtype=torch.float64) + 2


def test_the_recipe_is_that_of_the_plain_formula():
    rows = cone()
    expected = torch.from_numpy(reference.center_normalize(rows))
    assert torch.allclose(center_normalize(rows, mean_direction(rows)), expected, atol=1e-14)


def test_rows_have_length_one_and_the_cone_is_gone():
    rows = cone(400)
    centered = center_normalize(rows, mean_direction(rows))
    assert torch.allclose(centered.norm(dim=1), torch.ones(400, dtype=torch.float64))
    assert mean_direction(rows).norm() > 0.8
    assert mean_direction(centered).norm() < 0.2


def test_lengths_of_rows_do_not_matter():
    rows = cone()
    longer = rows * (1 + torch.arange(30.0)[:, None])
    expected = center_normalize(rows, mean_direction(rows))
    assert torch.allclose(center_normalize(longer, mean_direction(longer)), expected)


def test_a_row_that_is_the_mean_stays_zero():
    rows = torch.tensor([[3.0, 0.0]]).repeat(4, 1)
    assert torch.equal(center_normalize(rows, mean_direction(rows)), rows.double() * 0)


def test_half_precision_is_summed_wide():
    rows = cone(2000).half()
    assert torch.allclose(mean_direction(rows), mean_direction(rows.double()), atol=1e-14)


def test_values_that_are_not_finite_are_refused():
    rows = cone()
    rows[7, 2] = torch.inf
    with pytest.raises(UserError, match="features row 7 holds a value that is not finite"):
        mean_direction(rows)
