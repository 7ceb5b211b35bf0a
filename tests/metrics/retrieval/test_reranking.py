"""Hand-counted re-ranking: who may move, who may not, and what ties do."""

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.metrics import retrieval_ranks
from dist_siglip.metrics.retrieval.ranks import reranked_ranks

QUERY = torch.tensor([[1.0, 0.0]])
# Similarities 0.9, 0.8, 0.6, 0.
GALLERY = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.0, 1.0]])


def rank_of(scores, relevant, k, gallery=GALLERY):
    """Rank of the best relevant item; items have ids 0, 1, 2 ..., relevant ones have 100."""
    ids = torch.arange(len(gallery))
    ids[list(relevant)] = 100
    query_ids = torch.tensor([100])
    before = retrieval_ranks(QUERY, gallery, query_ids, ids)
    judged = []

    def judge(rows, positions):
        judged.extend(positions.tolist())
        return torch.tensor(scores)[positions]

    after = reranked_ranks(QUERY, gallery, query_ids, ids, before, judge, k=k)
    return before.item(), after.item(), judged


def test_the_best_score_among_the_candidates_comes_first():
    assert rank_of([0.1, 0.2, 0.9, 5.0], {2}, k=3) == (3, 1, [0, 1, 2])


def test_a_wrong_favourite_pushes_the_hit_back():
    assert rank_of([0.5, 0.9, 0.7, 0.0], {0}, k=3)[:2] == (1, 3)


def test_what_is_no_candidate_stays_where_it_was():
    assert rank_of([0.1, 0.2, 0.9, 5.0], {3}, k=3)[:2] == (4, 4)


def test_several_relevant_items_count_by_the_best_and_not_against_each_other():
    assert rank_of([0.9, 0.1, 0.8, 0.0], {1, 2}, k=3)[:2] == (2, 2)
    assert rank_of([0.7, 0.1, 0.8, 0.0], {1, 2}, k=3)[:2] == (2, 1)


def test_equal_scores_count_against_the_query():
    assert rank_of([0.3, 0.3, 0.3, 0.3], {0}, k=3)[:2] == (1, 3)


def test_more_candidates_than_items_are_all_of_them():
    assert rank_of([0.1, 0.2, 0.3, 0.9], {3}, k=50) == (4, 1, [0, 1, 2, 3])


def test_items_as_near_as_the_first_one_left_out_are_no_candidates():
    gallery = GALLERY[[0, 1, 1, 1]]
    # Two of three equal items would be candidates by chance.
    assert rank_of([0.1, 0.2, 0.9, 0.8], {2}, k=2, gallery=gallery) == (4, 4, [0])


def test_identical_embeddings_cannot_be_reranked_to_the_top():
    gallery = GALLERY[[0, 0, 0, 0]]
    assert rank_of([0.9, 0.0, 0.0, 0.0], {0}, k=2, gallery=gallery) == (4, 4, [])


def test_queries_are_judged_a_few_at_a_time():
    calls = []

    def judge(rows, positions):
        calls.append(sorted(set(rows.tolist())))
        return positions.double()

    ids = torch.arange(5)
    features = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    before = retrieval_ranks(features, features, ids, ids)
    reranked_ranks(features, features, ids, ids, before, judge, k=3, queries_per_call=2)
    assert calls == [[0, 1], [2, 3], [4]]


def test_no_candidates_at_all_are_refused():
    with pytest.raises(UserError, match=r"k \(0\) candidates of a query must be at least 1"):
        rank_of([0.0] * 4, {0}, k=0)
