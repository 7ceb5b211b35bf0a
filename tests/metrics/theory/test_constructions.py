"""Constructed configurations have exactly the margin and relative bias they promise."""

import math

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.metrics import collect_pair_statistics, constellation
from dist_siglip.metrics.capacity import capacity_alpha, largest_margin, subset_margin
from dist_siglip.metrics.constructions import (
    code_alpha,
    constellation_from_code,
    construction_one,
    construction_two,
    random_code,
    simplex_code,
    subset_code,
)


def _measure(images, texts):
    ids = torch.arange(len(images))
    statistics = collect_pair_statistics(images, texts, ids, ids, logit_scale=1.0, logit_bias=0.0)
    return constellation(statistics)


@pytest.mark.parametrize("num_points", [2, 3, 6, 40])
def test_points_of_a_simplex_have_equal_products(num_points):
    points = simplex_code(num_points)
    assert points.shape == (num_points, num_points - 1)
    products = points @ points.T
    expected = torch.full_like(products, -1 / (num_points - 1)).fill_diagonal_(1)
    assert torch.allclose(products, expected, atol=1e-12)


def test_simplex_has_the_largest_margin_there_is():
    result = _measure(simplex_code(7), simplex_code(7))
    assert result.margin == pytest.approx(largest_margin(result.relative_bias, 7))


def test_points_of_a_random_code_are_units_and_belong_to_the_seed():
    points = random_code(20, 300, seed=3)
    assert torch.allclose(points.norm(dim=1), torch.ones(20, dtype=torch.float64))
    assert torch.equal(points, random_code(20, 300, seed=3))
    assert code_alpha(points) < 0.25


@pytest.mark.parametrize(("delta", "phi"), [(1.0, 0.0), (0.8, 0.0), (0.7, 0.5), (0.0, 0.3)])
def test_construction_one_moves_margin_and_bias_as_promised(delta, phi):
    points = simplex_code(6)  # margin 0.6, relative bias 0.4
    images, texts = construction_one(points, points, delta=delta, phi=phi)
    assert images.shape == (6, 7)
    result = _measure(images, texts)
    assert result.margin == pytest.approx(delta**2 * 0.6, abs=1e-12)
    bias = delta**2 * 0.4 + phi**2 - (1 - delta**2 - phi**2)
    assert result.relative_bias == pytest.approx(bias, abs=1e-12)


@pytest.mark.parametrize(("margin", "bias"), [(0.1, 0.0), (0.2, 0.3), (0.05, -0.7), (0.3, 0.68)])
def test_a_code_gives_the_margin_and_bias_asked_for(margin, bias):
    points = random_code(30, 400, seed=1)
    assert code_alpha(points) <= capacity_alpha(margin, bias)
    result = _measure(*constellation_from_code(points, margin=margin, relative_bias=bias))
    assert result[:2] == pytest.approx((margin, bias), abs=1e-9)


def test_a_code_that_is_not_good_enough_is_refused():
    points = random_code(30, 6, seed=1)
    assert code_alpha(points) > capacity_alpha(0.2, 0.3)
    with pytest.raises(UserError, match="no room"):
        constellation_from_code(points, margin=0.2, relative_bias=0.3)
    with pytest.raises(UserError, match="no room"):
        constellation_from_code(torch.ones(2, 1), margin=0.2, relative_bias=0.3)


def test_a_code_exactly_good_enough_needs_no_shared_coordinate():
    points = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    assert capacity_alpha(0.125, -0.125) == code_alpha(points)
    images, _ = constellation_from_code(points, margin=0.125, relative_bias=-0.125)
    assert images[:, 2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num_modalities", [2, 3, 5])
def test_any_two_modalities_of_construction_two_are_one_constellation(num_modalities):
    points, delta = simplex_code(6), 0.8
    embeddings = construction_two(points, num_modalities, delta=delta)
    assert embeddings[0].shape == (6, 5 + num_modalities - 1)
    bias = delta**2 * 0.4 - (1 - delta**2) / (num_modalities - 1)
    for first in range(num_modalities):
        for second in range(first):
            result = _measure(embeddings[first], embeddings[second])
            assert result[:2] == pytest.approx((delta**2 * 0.6, bias), abs=1e-12)


@pytest.mark.parametrize(("num_documents", "k"), [(2, 1), (5, 1), (6, 2), (7, 3), (6, 4)])
def test_every_set_is_retrieved_at_the_largest_margin(num_documents, k):
    queries, documents = subset_code(num_documents, k)
    assert queries.shape == (math.comb(num_documents, k), num_documents)
    for rows in (queries, documents):
        assert torch.allclose(rows.norm(dim=1), rows.new_ones(len(rows)))
    products = (queries @ documents.T).sort(dim=1, descending=True).values
    margin = subset_margin(num_documents, k)
    assert torch.allclose(products[:, :k], products.new_tensor(margin), atol=1e-12)
    assert torch.allclose(products[:, k:], products.new_tensor(-margin), atol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: simplex_code(1),
        lambda: code_alpha(torch.eye(1)),
        lambda: construction_one(torch.eye(2), torch.eye(2), delta=0.9, phi=0.9),
        lambda: construction_one(torch.eye(2), torch.eye(2), delta=-0.1, phi=0.0),
        lambda: construction_two(torch.eye(2), 3, delta=1.1),
        lambda: subset_code(3, 3),
    ],
)
def test_impossible_arguments_are_refused(call):
    with pytest.raises(UserError):
        call()
