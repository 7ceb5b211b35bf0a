"""Dimensions and margins of retrieving every set of k documents."""

import math
from itertools import combinations

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.metrics.capacity import (
    critical_documents,
    subset_dimension,
    subset_dimension_scale,
    subset_margin,
)

TABLE_1 = {
    2: (4, 6, 8, 10, 12, 14, 16, 17, 19, 21),
    10: (13, 23, 33, 42, 52, 61, 71, 81, 90, 100),
    100: (None, 135, 233, 329, 425, 521, 617, 713, 809, 905),
}


@pytest.mark.parametrize("k", TABLE_1)
def test_dimensions_are_those_of_table_1(k):
    found = [
        None if expected is None else subset_dimension(10**power, k, 0.1)
        for power, expected in enumerate(TABLE_1[k], start=2)
    ]
    assert found == list(TABLE_1[k])


@pytest.mark.parametrize(
    ("num_documents", "k", "margin"),
    [(20, 2, 0.2928), (40, 2, 0.2761), (100, 2, 0.2670), (240, 2, 0.2636), (20, 3, 0.2623)],
)
def test_margins_are_those_of_the_closed_form(num_documents, k, margin):
    assert subset_margin(num_documents, k) == pytest.approx(margin, abs=5e-5)


@pytest.mark.parametrize("k", [1, 2, 9])
def test_margin_tends_to_its_limit(k):
    assert subset_margin(10**9, k) == pytest.approx(1 / (2 * math.sqrt(k) + 1), abs=1e-4)


def test_leaving_out_documents_is_as_hard_as_finding_them():
    assert subset_margin(9, 2) == pytest.approx(subset_margin(9, 7))


@pytest.mark.parametrize(("num_documents", "k"), [(5, 1), (6, 2), (7, 3), (6, 4)])
def test_no_embedding_has_a_larger_margin(num_documents, k):
    """Weights J on all pairs bound the margin by |J| sqrt(N n) / sum |J|; some weights meet it."""
    relevant = torch.zeros(math.comb(num_documents, k), num_documents, dtype=torch.float64)
    for query, documents in enumerate(combinations(range(num_documents), k)):
        relevant[query, list(documents)] = 1
    bounds = []
    for share in torch.linspace(0.01, 0.99, 197, dtype=torch.float64):
        weights = share * relevant / relevant.sum()
        weights -= (1 - share) * (1 - relevant) / (1 - relevant).sum()
        bounds.append(float(torch.linalg.matrix_norm(weights, 2)) * math.sqrt(relevant.numel()))
    assert subset_margin(num_documents, k) <= min(bounds)
    assert min(bounds) == pytest.approx(subset_margin(num_documents, k), rel=0.01)


def test_critical_documents_are_those_of_the_published_fit():
    published = {768: 1_709_800, 1024: 4_031_488, 3072: 107_769_914, 4096: 255_150_979}
    for dimension, documents in published.items():
        assert critical_documents(dimension) == pytest.approx(documents, abs=1)


def test_scale_grows_with_the_documents():
    assert subset_dimension_scale(200, 2) > subset_dimension_scale(100, 2) > 2


@pytest.mark.parametrize("k", [0, 5])
def test_sets_that_are_none_are_refused(k):
    for call in (subset_margin, subset_dimension_scale):
        with pytest.raises(UserError, match="k "):
            call(5, k)


def test_a_margin_that_is_none_and_a_dimension_without_measurements_are_refused():
    with pytest.raises(UserError, match="margin"):
        subset_dimension(10, 2, 0.0)
    with pytest.raises(UserError, match="dimension"):
        critical_documents(3)
