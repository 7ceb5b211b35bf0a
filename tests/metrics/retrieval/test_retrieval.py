"""Ranks on hand-counted galleries: ties, several relevant items, and the ends of the range."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.retrieval import retrieval_hit_rate

from dist_siglip.errors import UserError
from dist_siglip.metrics import median_rank, recall_at_k, retrieval_ranks, retrieval_ranks_both_ways
from tests.support import metric_reference


def _ranks_of_scores(scores, query_ids, gallery_ids):
    """Ranks for a given score matrix: gallery items are unit vectors, queries are its rows."""
    scores = torch.tensor(scores, dtype=torch.float32)
    gallery = torch.eye(scores.shape[1])
    ids = torch.tensor(query_ids), torch.tensor(gallery_ids)
    return retrieval_ranks(scores, gallery, *ids).tolist()


def _random_pairs(num_images=12, num_texts=17, num_ids=9, dim=5, dtype=torch.float32):
    images = F.normalize(torch.randn(num_images, dim, dtype=dtype), dim=1)
    texts = F.normalize(torch.randn(num_texts, dim, dtype=dtype), dim=1)
    image_ids = torch.randint(num_ids, (num_images,))
    text_ids = torch.randint(num_ids, (num_texts,))
    return images, texts, image_ids, text_ids


def test_rank_counts_items_ahead_of_the_best_relevant_one():
    assert _ranks_of_scores([[0.9, 0.5, 0.7]], [1], [0, 1, 2]) == [3]


def test_several_relevant_texts_use_the_best_and_never_count_against_each_other():
    # Relevant: columns 0, 2 and 3; only column 1 is ahead of the best of them.
    assert _ranks_of_scores([[0.2, 0.9, 0.8, 0.8]], [7], [7, 1, 7, 7]) == [2]


def test_ties_count_against_the_query():
    assert _ranks_of_scores([[0.5, 0.5, 0.5, 0.1]], [0], [0, 1, 2, 3]) == [3]


def test_query_without_relevant_item_ranks_behind_the_whole_gallery():
    assert _ranks_of_scores([[0.5, 0.4]], [9], [0, 1]) == [3]


def test_negative_scores_rank_like_any_others():
    assert _ranks_of_scores([[-1.0, -5.0, -3.0]], [0], [0, 1, 2]) == [1]


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_embeddings_score_no_hits(chunk_rows, dtype):
    # A direction whose products round: a tie must stay a tie in every rectangle.
    point = F.normalize(torch.linspace(0.1, 3.7, 384, dtype=torch.float64), dim=0)
    features, ids = point.to(dtype).repeat(9, 1), torch.arange(9)
    both = retrieval_ranks_both_ways(features, features, ids, ids, chunk_rows=chunk_rows)
    assert [ranks.tolist() for ranks in both] == [[9] * 9, [9] * 9]


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 1024])
def test_both_directions_match_the_plain_loop(chunk_rows):
    images, texts, image_ids, text_ids = _random_pairs()
    texts[3] = texts[8]  # a tie between different ids
    text_ids[3], text_ids[8] = 0, 1
    image_to_text, text_to_image = retrieval_ranks_both_ways(
        images, texts, image_ids, text_ids, chunk_rows=chunk_rows
    )
    assert image_to_text.tolist() == metric_reference.ranks(images, texts, image_ids, text_ids)
    assert text_to_image.tolist() == metric_reference.ranks(texts, images, text_ids, image_ids)


def test_one_way_equals_both_ways():
    pairs = _random_pairs()
    assert torch.equal(retrieval_ranks(*pairs), retrieval_ranks_both_ways(*pairs)[0])


def test_bfloat16_features_are_ranked_by_wide_products():
    images, texts, image_ids, text_ids = _random_pairs(200, 200, 150, dtype=torch.bfloat16)
    narrow = retrieval_ranks(images, texts, image_ids, text_ids)
    wide = retrieval_ranks(images.double(), texts.double(), image_ids, text_ids)
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("shift", [-3.0, 10.0])
def test_recall_does_not_change_when_a_constant_is_added_to_all_scores(shift):
    scores = torch.randn(20, 15)
    query_ids, gallery_ids = torch.arange(20) % 15, torch.arange(15)
    ranks = retrieval_ranks(scores, torch.eye(15), query_ids, gallery_ids)
    moved = retrieval_ranks(scores + shift, torch.eye(15), query_ids, gallery_ids)
    assert [recall_at_k(ranks, k) for k in range(1, 16)] == [
        recall_at_k(moved, k) for k in range(1, 16)
    ]


def test_swapping_the_modalities_swaps_the_directions():
    images, texts, image_ids, text_ids = _random_pairs()
    forward = retrieval_ranks_both_ways(images, texts, image_ids, text_ids)
    backward = retrieval_ranks_both_ways(texts, images, text_ids, image_ids)
    assert torch.equal(forward[0], backward[1])
    assert torch.equal(forward[1], backward[0])


def test_permuting_the_gallery_changes_no_rank():
    images, texts, image_ids, text_ids = _random_pairs()
    order = torch.randperm(len(texts))
    ranks = retrieval_ranks(images, texts, image_ids, text_ids)
    assert torch.equal(ranks, retrieval_ranks(images, texts[order], image_ids, text_ids[order]))


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_equals_torchmetrics_hit_rate(k):
    images, texts, image_ids, text_ids = _random_pairs(40, 60, 25)
    hits = [
        retrieval_hit_rate(texts @ image, text_ids == image_id, top_k=k)
        for image, image_id in zip(images, image_ids, strict=True)
    ]
    ranks = retrieval_ranks(images, texts, image_ids, text_ids)
    expected = float(torch.stack(hits).double().mean())
    assert recall_at_k(ranks, k, gallery_size=len(texts)) == pytest.approx(expected, abs=1e-12)


def test_recall_counts_queries_not_relevant_items():
    # Two relevant texts, one of them first: a hit, not half a hit.
    ranks = retrieval_ranks(
        torch.tensor([[0.9, 0.5, 0.1]]), torch.eye(3), torch.tensor([0]), torch.tensor([0, 1, 0])
    )
    assert recall_at_k(ranks, 1) == 1.0


def test_recall_with_k_beyond_the_gallery_misses_only_queries_without_relevant_items():
    ranks = torch.tensor([1, 3, 4])  # of a gallery of 3
    assert recall_at_k(ranks, 10, gallery_size=3) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("ranks", "median"), [([5], 5.0), ([4, 1, 2], 2.0), ([1, 2, 8, 3], 2.5)])
def test_median_rank(ranks, median):
    assert median_rank(torch.tensor(ranks)) == median


def test_recall_refuses_no_queries_and_k_below_one():
    with pytest.raises(UserError, match="at least one query"):
        recall_at_k(torch.tensor([], dtype=torch.int64), 1)
    with pytest.raises(UserError, match=r"k \(0\)"):
        recall_at_k(torch.tensor([1]), 0)


def test_empty_sides_are_allowed():
    features, ids = torch.eye(3), torch.arange(3)
    nothing, no_ids = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    image_to_text, text_to_image = retrieval_ranks_both_ways(features, nothing, ids, no_ids)
    assert image_to_text.tolist() == [1, 1, 1]  # behind a gallery of nothing
    assert text_to_image.tolist() == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused_by_row_and_rank(value):
    images, texts, image_ids, text_ids = _random_pairs()
    texts[4, 1] = value
    with pytest.raises(UserError, match=r"text_features row 4 .* not finite.*\(rank 0\)"):
        retrieval_ranks_both_ways(images, texts, image_ids, text_ids)


def test_chunk_rows_below_one_is_refused():
    with pytest.raises(UserError, match=r"chunk_rows \(0\)"):
        retrieval_ranks(*_random_pairs(), chunk_rows=0)


def test_similarities_never_exceed_one_tile(monkeypatch):
    from dist_siglip.metrics.retrieval import narrow_counts, ranks

    largest = {}

    def record(module, name):
        original = getattr(module, name)

        def recording(rows, columns):
            result = original(rows, columns)
            largest[name] = max(largest.get(name, 0), result.numel())
            return result

        monkeypatch.setattr(module, name, recording)

    record(ranks, "exact_similarity")
    record(narrow_counts, "narrow_similarity")
    retrieval_ranks_both_ways(*_random_pairs(30, 40), chunk_rows=8)
    assert largest == {"exact_similarity": 64, "narrow_similarity": 64}
