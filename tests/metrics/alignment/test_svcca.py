"""SVCCA from second moments: singular vectors of the rows, scikit-learn, and closed forms."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA

from dist_siglip.errors import UserError
from dist_siglip.metrics.alignment import collect_moments, svcca
from tests.support import reference_representations as reference


def pair(count=60, shift=0.5):
    first = torch.randn(count, 6, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.2])
    second = first @ torch.randn(6, 8, dtype=torch.float64)
    return first + shift, second + 2 * torch.randn(count, 8, dtype=torch.float64) + shift


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("dimensions", [1, 3, 6])
def test_values_are_those_of_singular_vectors_of_the_rows(dimensions, standardize):
    first, second = pair()
    ours = svcca(collect_moments(first, second), dimensions, standardize=standardize)
    expected = reference.svcca(first, second, dimensions, standardize=standardize)
    assert ours == pytest.approx(expected, abs=1e-8)


def test_the_two_conventions_are_different_numbers():
    moments = collect_moments(*pair(shift=3))
    assert abs(svcca(moments, 3) - svcca(moments, 3, standardize=False)) > 0.01


def test_scikit_learn_agrees_about_the_canonical_correlations():
    """What the published code calls; it iterates, so the third digit may differ."""
    first, second = pair(400)
    bases = []
    for rows in (first, second):
        rows = ((rows - rows.mean(0)) / rows.std(0)).numpy()
        bases.append(np.linalg.svd(rows, full_matrices=False)[0][:, :3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = CCA(n_components=3).fit(*bases).transform(*bases)
    theirs = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(parts[0].T, parts[1].T, strict=True)])
    assert svcca(collect_moments(first, second), 3) == pytest.approx(theirs, abs=5e-3)


def test_linear_maps_and_shifts_change_nothing_when_all_directions_are_kept():
    first, _ = pair()
    mixed = first @ torch.randn(6, 6, dtype=torch.float64) - 4
    assert svcca(collect_moments(first, mixed), 6) == pytest.approx(1, abs=1e-9)


def test_correlation_of_single_columns_is_pearsons():
    first, second = (side[:, :1] for side in pair())
    pearson = np.corrcoef(first[:, 0], second[:, 0])[0, 1]
    ours = svcca(collect_moments(first, second), 1)
    assert ours == pytest.approx(abs(pearson), abs=1e-12)


def test_independent_sides_are_near_zero_with_many_rows():
    moments = collect_moments(torch.randn(4000, 8), torch.randn(4000, 8))
    assert svcca(moments, 3) < 0.06


def test_a_side_with_fewer_directions_has_fewer_correlations():
    first, _ = pair()
    flat = torch.cat([first[:, :2], first[:, :2], torch.full((60, 1), 0.1)], dim=1)
    assert svcca(collect_moments(flat, first[:, :2]), 5) == pytest.approx(1, abs=1e-9)


def test_a_side_without_spread_has_no_value():
    assert math.isnan(svcca(collect_moments(pair()[0], torch.full((60, 3), 0.1))))


def test_no_dimension_is_refused():
    with pytest.raises(UserError, match=r"dimensions \(0\) of SVCCA must be at least 1; try 10"):
        svcca(collect_moments(*pair()), 0)
