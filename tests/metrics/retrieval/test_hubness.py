"""Hubs and antihubs: hand-counted lists, scipy's skewness, and a hub that is one."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import skew

from dist_siglip.metrics.retrieval.nearest import hubness, hubness_of_counts
from tests.support import reference_geometry


def test_hand_counted_lists():
    # Keys 0 and 1 are the first two of queries 0 to 2; key 2 is the second of query 3.
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.0]] * 3 + [[0.9, 0.0, 0.8, 0.1]])
    found = hubness(scores, torch.eye(4), 2)
    assert found == hubness_of_counts(torch.tensor([4, 3, 1, 0]))
    assert found.top_share == 0.5
    assert found.antihubs == 0.25


def test_skewness_is_that_of_scipy():
    counts = torch.randint(0, 9, (50,))
    assert hubness_of_counts(counts).skewness == pytest.approx(skew(counts.numpy()), rel=1e-12)


def test_everything_matches_the_plain_loop():
    queries, keys = (F.normalize(torch.randn(23, 4), dim=1) for _ in range(2))
    counts = reference_geometry.occurrences(queries, keys, 5)
    found = hubness(queries, keys, 5, chunk_rows=7)
    assert found.skewness == pytest.approx(reference_geometry.skewness(counts))
    assert found.antihubs == counts.count(0) / 23
    assert found.top_share == max(counts) / sum(counts)


def test_top_hubs_are_one_percent_of_the_keys():
    counts = torch.ones(300, dtype=torch.int64)
    counts[:3] = 101
    assert hubness_of_counts(counts).top_share == pytest.approx(303 / 600)


def test_keys_found_equally_often_are_no_hubs():
    points = torch.eye(200)
    assert hubness(points, points, 1) == (0.0, 0.01, 0.0)
    assert hubness(points[:5], points[:5], 9) == (0.0, 0.2, 0.0)  # every list holds every key


def test_a_key_in_the_middle_of_all_queries_is_a_hub():
    queries = F.normalize(torch.randn(300, 40) + 1, dim=1)
    keys = F.normalize(torch.randn(300, 40), dim=1)
    without = hubness(queries, keys, 3)
    keys[7] = F.normalize(torch.ones(40), dim=0)
    found = hubness(queries, keys, 3)
    assert found.skewness > 2 * without.skewness
    assert found.top_share > 0.3


def test_own_rows_can_be_left_out():
    points, ids = torch.eye(3), torch.arange(3)
    assert hubness(points, points, 1, query_ids=ids, key_ids=ids).antihubs == pytest.approx(1 / 3)


def test_nothing_to_find_is_nothing():
    assert hubness(torch.eye(2)[:0], torch.eye(2), 1) == (0.0, 0.0, 0.0)
    assert hubness(torch.eye(2), torch.eye(2)[:0], 1) == (0.0, 0.0, 0.0)
