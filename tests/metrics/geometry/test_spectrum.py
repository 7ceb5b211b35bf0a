"""Principal components: scikit-learn as oracle, a plain loop, and known spreads."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from dist_siglip.errors import UserError
from dist_siglip.metrics.geometry.spread import (
    collect_moments,
    components_for,
    explained_variance_ratios,
)
from tests.support import reference_geometry


def _ratios(rows):
    return explained_variance_ratios(collect_moments(rows))


def _rows(count=60, width=7):
    spread = torch.arange(1, width + 1, dtype=torch.float64)
    return F.normalize(torch.randn(count, width, dtype=torch.float64) * spread + 2, dim=1)


def test_ratios_are_those_of_scikit_learn():
    rows = _rows()
    expected = PCA().fit(rows.numpy()).explained_variance_ratio_
    assert _ratios(rows).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_ratios_are_eigenvalues_of_the_centred_moments():
    rows = _rows(11, 3)
    scatter = torch.tensor(reference_geometry.scatter(rows), dtype=torch.float64)
    expected = torch.linalg.eigvalsh(scatter).flip(0) / scatter.trace()
    assert _ratios(rows).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_a_common_offset_is_no_variance():
    rows = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert _ratios(rows + 100).tolist() == pytest.approx([0.8, 0.2], abs=1e-9)


def test_more_rows_than_one_part_have_the_same_spectrum(monkeypatch):
    rows = _rows(90)
    whole = _ratios(rows)
    monkeypatch.setattr("dist_siglip.metrics.tiles._SUMMED_ROWS", 16)
    assert torch.allclose(_ratios(rows), whole, atol=1e-13)


def test_fewer_rows_than_features_leave_components_without_variance():
    ratios = _ratios(torch.eye(4)[:2])
    assert ratios.tolist() == pytest.approx([1, 0, 0, 0], abs=1e-12)


@pytest.mark.parametrize("rows", [torch.eye(3)[:1], F.normalize(torch.ones(5, 3), dim=1)])
def test_one_point_has_no_spectrum(rows):
    ratios = _ratios(rows)
    assert ratios.isnan().all()
    assert math.isnan(components_for(ratios, 0.8))


@pytest.mark.parametrize(
    ("share", "components"), [(0.5, 1), (0.6, 1), (0.61, 2), (0.9, 2), (0.95, 3), (1.0, 3)]
)
def test_components_are_the_fewest_that_hold_the_share(share, components):
    ratios = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    assert components_for(ratios, share) == components


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match="share"):
        components_for(torch.tensor([1.0]), share)
