"""Free embeddings that must answer every query for k of n documents."""

import math

import torch

from dist_siglip.lab.free_embeddings import Retrieval, fit_margin, is_solvable, subset_relevance
from dist_siglip.metrics import relevance_margins, subset_code, subset_margin


def test_there_is_a_query_for_every_set_of_documents():
    relevance = subset_relevance(6, 3)
    assert len(relevance) == math.comb(6, 3)
    assert (relevance.sum(dim=1) == 3).all()
    assert len(relevance.unique(dim=0)) == len(relevance)


def test_the_queries_are_those_of_the_best_construction():
    """Same order of queries: the construction reaches its closed form on our matrix."""
    margins = relevance_margins(*subset_code(5, 2), subset_relevance(5, 2))
    assert math.isclose(margins.margin, subset_margin(5, 2), rel_tol=1e-9)


def test_the_sigmoid_loss_comes_near_the_largest_margin_around_zero():
    """Its threshold is frozen at 0; around another one the gap may be wider."""
    case = Retrieval(num_documents=5, dimension=6)
    margins = fit_margin(case, "sigmoid", steps=1500).margins
    around_zero = margins.margin - abs(margins.relative_bias)
    assert 0.8 * subset_margin(5, 2) < around_zero <= subset_margin(5, 2) + 1e-6


def test_a_plane_ranks_neighbours_on_a_circle_but_not_all_pairs():
    """In 2 dimensions only neighbours on the circle can be the two nearest of a query."""
    assert is_solvable(Retrieval(num_documents=3, dimension=2))
    assert not is_solvable(Retrieval(num_documents=5, dimension=2), steps=1500)


def test_the_same_seed_gives_the_same_rows():
    case = Retrieval(num_documents=4, dimension=3, seed=1)
    one, other = (fit_margin(case, "softmax", steps=20).training.rows for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
