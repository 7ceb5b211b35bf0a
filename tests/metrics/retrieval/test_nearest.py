"""Nearest keys: hand-counted lists, ties, ids, and a plain loop."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics import nearest_neighbors
from tests.support import reference_geometry


def _from_scores(scores, k, **ids):
    """Neighbours for a given score matrix: keys are unit vectors, queries are its rows."""
    scores = torch.tensor(scores)
    return nearest_neighbors(scores, torch.eye(scores.shape[1]), k, **ids)


def test_best_come_first():
    found = _from_scores([[0.1, 0.9, 0.5], [-0.3, -0.2, -0.1]], 2)
    assert found.positions.tolist() == [[1, 2], [2, 1]]
    assert found.similarities.tolist()[1] == pytest.approx([-0.1, -0.2], abs=1e-7)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_of_equal_ones_the_lowest_position_comes_first(k):
    scores = [[0.5, 0.7, 0.5, 0.5, 0.7, 0.5]]
    for chunk_rows in (1, 2, 4, 100):
        keys = torch.eye(6)
        found = nearest_neighbors(torch.tensor(scores), keys, k, chunk_rows=chunk_rows)
        assert found.positions.tolist() == [[1, 4, 0, 2, 3, 5][:k]]


def test_pairs_with_equal_ids_are_left_out():
    scores = [[0.9, 0.8, 0.7, 0.6]]
    ids = {"query_ids": torch.tensor([7]), "key_ids": torch.tensor([7, 1, 7, 2])}
    assert _from_scores(scores, 2, **ids).positions.tolist() == [[1, 3]]


def test_fewer_allowed_keys_than_asked_for_leave_empty_places():
    ids = {"query_ids": torch.tensor([7]), "key_ids": torch.tensor([7, 1])}
    found = _from_scores([[0.5, -0.25]], 3, **ids)
    assert found.positions.tolist() == [[1, -1, -1]]
    assert found.similarities.tolist() == [[-0.25, -torch.inf, -torch.inf]]


def test_no_keys_and_no_queries_are_fine():
    assert nearest_neighbors(torch.eye(2), torch.eye(2)[:0], 1).positions.tolist() == [[-1], [-1]]
    assert nearest_neighbors(torch.eye(2)[:0], torch.eye(2), 3).positions.shape == (0, 3)


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matches_the_plain_loop(chunk_rows, dtype):
    queries = F.normalize(torch.randn(9, 4), dim=1).to(dtype)
    keys = F.normalize(torch.randn(17, 4), dim=1).to(dtype)
    keys[3], keys[16] = keys[8], keys[8]
    ids = torch.arange(9) % 5, torch.arange(17) % 7
    found = nearest_neighbors(
        queries, keys, 6, query_ids=ids[0], key_ids=ids[1], chunk_rows=chunk_rows
    )
    expected = reference_geometry.nearest(queries, keys, 6, *ids)
    assert found.positions.tolist() == [[p for _, p in row] for row in expected]
    for mine, row in zip(found.similarities.tolist(), expected, strict=True):
        assert mine == pytest.approx([score for score, _ in row], abs=1e-11)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 1024])
def test_copies_of_one_key_are_ties_in_every_rectangle(chunk_rows):
    # A direction whose products round differently in rectangles of different shape.
    point = F.normalize(torch.linspace(0.1, 3.7, 384), dim=0)
    keys = point.repeat(23, 1)
    found = nearest_neighbors(keys[:3], keys, 5, chunk_rows=chunk_rows)
    assert found.positions.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_a_wrong_k_is_refused():
    with pytest.raises(UserError, match=r"k \(0\)"):
        nearest_neighbors(torch.eye(2), torch.eye(2), 0)


def test_ids_of_one_side_only_are_refused():
    with pytest.raises(UserError, match="together"):
        nearest_neighbors(torch.eye(2), torch.eye(2), 1, query_ids=torch.arange(2))


def test_a_number_that_is_not_finite_is_named():
    with pytest.raises(UserError, match="keys row 1"):
        nearest_neighbors(torch.eye(2), torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]), 1)
