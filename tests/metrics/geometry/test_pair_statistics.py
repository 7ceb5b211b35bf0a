"""Sums over all pairs against plain loops, and the quantiles of the histograms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics import collect_pair_statistics, histogram_edges
from dist_siglip.metrics.geometry.pair_statistics import NUM_BINS
from tests.support import metric_reference


def _pairs(count=14, num_ids=10, dim=5):
    images = F.normalize(torch.randn(count, dim), dim=1)
    texts = F.normalize(torch.randn(count, dim), dim=1)
    ids = torch.randint(num_ids, (count,))
    return images, texts, ids


def _collect(images, texts, ids, **settings):
    settings = {"logit_scale": 10.0, "logit_bias": -10.0} | settings
    return collect_pair_statistics(images, texts, ids, ids, **settings)


@pytest.mark.parametrize("chunk_rows", [1, 4, 1024])
def test_sums_and_extremes_match_the_plain_loop(chunk_rows):
    images, texts, ids = _pairs()
    statistics = _collect(images, texts, ids, chunk_rows=chunk_rows)
    kinds = metric_reference.cosines_by_kind(images, texts, ids, ids)
    assert len(kinds[0]) > len(ids)  # some captions are equal
    for summary, cosines in zip((statistics.positive, statistics.negative), kinds, strict=True):
        assert summary.count == len(cosines) == int(summary.histogram.sum())
        assert summary.minimum == pytest.approx(min(cosines), abs=1e-15)
        assert summary.maximum == pytest.approx(max(cosines), abs=1e-15)
        assert summary.mean == pytest.approx(np.mean(cosines), abs=1e-14)
        assert summary.std == pytest.approx(np.std(cosines), abs=1e-12)


def test_histogram_matches_numpy():
    images, texts, ids = _pairs(60, 40)
    statistics = _collect(images, texts, ids)
    positive, negative = metric_reference.cosines_by_kind(images, texts, ids, ids)
    edges = histogram_edges().numpy()
    for summary, cosines in ((statistics.positive, positive), (statistics.negative, negative)):
        expected, _ = np.histogram(cosines, edges)
        # A cosine on an edge may fall on either side of it.
        assert np.abs(summary.histogram.numpy() - expected).sum() <= 2
        assert np.array_equal(summary.histogram.numpy().cumsum()[-1], len(cosines))


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("count", [2, 3, 11, 61])
def test_a_quantile_is_that_of_numpy(count, fraction):
    images, texts, ids = _pairs(count, 1000)
    statistics = _collect(images, texts, ids, chunk_rows=4)
    kinds = metric_reference.cosines_by_kind(images, texts, ids, ids)
    for summary, cosines in zip((statistics.positive, statistics.negative), kinds, strict=True):
        expected = np.quantile(cosines, fraction)
        assert summary.quantile(fraction) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("count", [3, 11, 61])
def test_a_quantile_of_many_pairs_is_within_one_bin(monkeypatch, count, fraction):
    monkeypatch.setattr("dist_siglip.metrics.geometry.pair_statistics.MOST_EXACT_PAIRS", count)
    images, texts, ids = _pairs(count, 1000)
    statistics = _collect(images, texts, ids, chunk_rows=4)
    cosines = metric_reference.cosines_by_kind(images, texts, ids, ids)[1]
    assert statistics.negative.cosines is None
    assert statistics.negative.quantile(fraction) == pytest.approx(
        np.quantile(cosines, fraction), abs=2 / NUM_BINS
    )


@pytest.mark.parametrize(
    ("scale", "bias"), [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan)]
)
def test_a_scale_or_bias_that_is_none_is_refused(scale, bias):
    images, texts, ids = _pairs(4)
    with pytest.raises(UserError, match=r"logit_scale \(.*must be a finite number above 0"):
        _collect(images, texts, ids, logit_scale=scale, logit_bias=bias)


def test_ends_of_the_range_fall_into_the_last_bins():
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    statistics = _collect(images, images, torch.arange(2))
    assert int(statistics.positive.histogram[-1]) == 2
    assert int(statistics.negative.histogram[0]) == 2
    assert statistics.negative.quantile(0.5) == pytest.approx(-1, abs=2 / NUM_BINS)


def test_softplus_sums_split_own_from_other_pairs():
    images, texts, _ = _pairs()
    statistics = _collect(images, texts, torch.zeros(14, dtype=torch.int64), chunk_rows=5)
    logits = [[10 * float(i.double() @ t.double()) - 10 for t in texts] for i in images]
    own = math.fsum(metric_reference.softplus(-logits[i][i]) for i in range(14))
    other = math.fsum(
        metric_reference.softplus(logits[i][j]) for i in range(14) for j in range(14) if i != j
    )
    # Equal captions (all, here) stay negatives of the loss, as in training.
    assert statistics.own_softplus_sum == pytest.approx(own, rel=1e-13)
    assert statistics.other_softplus_sum == pytest.approx(other, rel=1e-13)


def test_softplus_is_exact_for_large_logits():
    images = torch.eye(2)
    statistics = _collect(images, images.flip(0), torch.arange(2), logit_scale=1e4, logit_bias=0.0)
    assert statistics.own_softplus_sum == pytest.approx(2 * math.log(2))
    assert statistics.other_softplus_sum == pytest.approx(2e4, rel=1e-15)
    tiny = _collect(images, images, torch.arange(2), logit_scale=60.0, logit_bias=-60.0)
    assert tiny.other_softplus_sum == pytest.approx(2 * math.exp(-60), rel=1e-12)


def test_a_kind_without_pairs_has_no_numbers():
    images, texts, _ = _pairs(4)
    negative = _collect(images, texts, torch.zeros(4, dtype=torch.int64)).negative
    assert negative.count == 0
    numbers = (negative.mean, negative.std, negative.minimum, negative.maximum)
    assert all(math.isnan(number) for number in (*numbers, negative.quantile(0.5)))


def test_no_pairs_at_all_are_refused():
    nothing, ids = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(UserError, match="no rank has any pair"):
        _collect(nothing, nothing, ids)
