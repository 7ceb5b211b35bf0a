"""Margins over a relevance matrix: plain loops, hand-counted cases, any number of ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics import relevance_margins
from tests.support import reference_relevance
from tests.support.processes import run_ranks

# Queries and documents by rank; one rank without queries, one without documents.
LAYOUTS = {1: ((9,), (6,)), 2: ((9, 0), (2, 4)), 3: ((5, 0, 4), (2, 4, 0))}


def _rows():
    generator = torch.Generator().manual_seed(5)
    queries, documents = (
        F.normalize(torch.randn(n, 4, generator=generator), dim=1) for n in (9, 6)
    )
    relevance = torch.rand(9, 6, generator=generator) < 0.4
    relevance[2] = False
    return queries, documents, relevance


def _measure(rank, world_size):
    queries, documents, relevance = _rows()
    query_counts, document_counts = LAYOUTS[world_size]
    mine = slice(sum(query_counts[:rank]), sum(query_counts[: rank + 1]))
    own = slice(sum(document_counts[:rank]), sum(document_counts[: rank + 1]))
    return relevance_margins(queries[mine], documents[own], relevance[mine], chunk_rows=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_margins_are_those_of_plain_loops_on_any_number_of_ranks(world_size):
    expected = reference_relevance.relevance_margins(*_rows())
    found = [_measure(0, 1)] if world_size == 1 else run_ranks(_measure, world_size)
    for margins in found:
        assert margins._asdict() == pytest.approx(expected, rel=1e-6)


def test_a_threshold_for_each_query_can_exist_where_none_serves_all():
    """Answers at .6 and 1; others at 0 and .8: only within a query do answers win."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    documents = torch.tensor([[0.6, -0.8], [0.0, 1.0], [-0.6, 0.8]])
    relevance = torch.tensor([[True, False, False], [False, True, False]])
    found = relevance_margins(queries, documents, relevance)
    assert found.margin == pytest.approx((0.6 - 0.8) / 2)
    assert found.row_margin == pytest.approx((1.0 - 0.8) / 2)
    assert found.top_k_accuracy == 1.0


def test_a_simplex_of_documents_has_the_closed_form_margin():
    """Corners of a regular simplex, each its own query: cosines 1 and -1 / (n - 1)."""
    n = 5
    corners = F.normalize(torch.eye(n, dtype=torch.float64) - 1 / n, dim=1)
    found = relevance_margins(corners, corners, torch.eye(n, dtype=torch.bool))
    assert found.margin == pytest.approx((1 + 1 / (n - 1)) / 2)
    assert found.relative_bias == pytest.approx((1 - 1 / (n - 1)) / 2)


def test_an_answer_outside_of_the_top_k_is_missed():
    queries = torch.tensor([[1.0, 0.0]])
    documents = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    found = relevance_margins(queries, documents, torch.tensor([[True, False, True]]))
    assert found.top_k_accuracy == 0.5


def test_without_other_documents_nothing_bounds_the_margin():
    found = relevance_margins(torch.eye(2), torch.eye(2), torch.ones(2, 2, dtype=torch.bool))
    assert found.margin == math.inf


def test_a_matrix_that_does_not_fit_is_refused():
    queries, documents, relevance = _rows()
    with pytest.raises(UserError, match=r"must be bool \(9, 6\)"):
        relevance_margins(queries, documents, relevance[:, 1:])
    with pytest.raises(UserError, match="query_features row 0 has norm 2"):
        relevance_margins(2 * queries, documents, relevance)
