"""Margins of single rows and the other sums over all pairs, against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.metrics import (
    collect_pair_statistics,
    constellation,
    cross_uniformity,
    joint_constellation,
    mean_constellation,
)
from dist_siglip.metrics.constructions import construction_two, simplex_code
from tests.support import metric_reference, reference_geometry


def _pairs(count=14, num_ids=10, dim=5):
    images = F.normalize(torch.randn(count, dim), dim=1)
    texts = F.normalize(torch.randn(count, dim), dim=1)
    return images, texts, torch.randint(num_ids, (count,))


def _collect(images, texts, ids=None, **settings):
    ids = torch.arange(len(images)) if ids is None else ids
    return collect_pair_statistics(
        images, texts, ids, ids, logit_scale=1.0, logit_bias=0.0, **settings
    )


@pytest.mark.parametrize("chunk_rows", [1, 4, 1024])
def test_row_margins_match_the_plain_loop(chunk_rows):
    images, texts, ids = _pairs()
    statistics = _collect(images, texts, ids, chunk_rows=chunk_rows)
    for found, expected in (
        (statistics.image_rows, reference_geometry.row_margins(images, texts, ids, ids)),
        (statistics.text_rows, reference_geometry.row_margins(texts, images, ids, ids)),
    ):
        assert found.count == 14
        assert found.minimum == pytest.approx(min(expected), abs=1e-14)
        assert found.mean == pytest.approx(sum(expected) / 14, abs=1e-14)


def test_rows_may_be_ahead_without_a_common_threshold():
    # Image 0 scores 0.85 and 0.5, image 1 scores 0.2 and 0.4: each finds its own text.
    rest = [math.sqrt(1 - 0.85**2 - 0.5**2), math.sqrt(1 - 0.2**2 - 0.4**2)]
    images = torch.tensor([[0.85, 0.5, rest[0]], [0.2, 0.4, rest[1]]])
    statistics = _collect(images, torch.eye(3)[:2])
    assert constellation(statistics).margin == pytest.approx(-0.05)
    assert statistics.image_rows.minimum == pytest.approx(0.1)
    assert statistics.text_rows.minimum == pytest.approx(-0.05)


@pytest.mark.parametrize("seed", range(3))
def test_smallest_row_margin_is_never_below_the_margin_of_all(seed):
    torch.manual_seed(seed)
    statistics = _collect(*_pairs())
    margin = constellation(statistics).margin
    assert min(statistics.image_rows.minimum, statistics.text_rows.minimum) >= margin


def test_rows_without_negatives_have_no_margin():
    statistics = _collect(torch.eye(2), torch.eye(2), torch.tensor([5, 5]))
    assert statistics.image_rows.count == 0
    assert math.isnan(statistics.image_rows.minimum)
    assert math.isnan(statistics.image_rows.mean)


@pytest.mark.parametrize("chunk_rows", [1, 4, 1024])
def test_cross_uniformity_matches_the_plain_loop(chunk_rows):
    images, texts, ids = _pairs()
    found = cross_uniformity(_collect(images, texts, ids, chunk_rows=chunk_rows))
    assert found == pytest.approx(reference_geometry.cross_uniformity(images, texts), rel=1e-12)


def test_cross_uniformity_of_opposite_points_leaves_own_pairs_out():
    # Other pairs are at distance 2, own pairs at 0: with these the mean would be above exp(-8).
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert cross_uniformity(_collect(points, points)) == pytest.approx(-8)
    assert math.isnan(cross_uniformity(_collect(points[:1], points[:1])))


def test_mean_constellation_lies_between_the_means():
    images, texts, ids = _pairs()
    negative, positive = (
        sum(cosines) / len(cosines)
        for cosines in reversed(metric_reference.cosines_by_kind(images, texts, ids, ids))
    )
    found = mean_constellation(_collect(images, texts, ids))
    assert found.margin == pytest.approx((positive - negative) / 2, abs=1e-14)
    assert found.relative_bias == pytest.approx((positive + negative) / 2, abs=1e-14)


def test_one_threshold_for_three_modalities_is_the_worst_of_each_two():
    modalities = construction_two(simplex_code(6), 3, delta=0.8)
    modalities[2] = F.normalize(modalities[2] + 0.05 * torch.randn(6, 7).double(), dim=1)
    edges = [_collect(modalities[a], modalities[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    joint = joint_constellation(edges)
    assert joint.margin < min(constellation(edge).margin for edge in edges)
    assert joint.positive_end == min(constellation(edge).positive_end for edge in edges)
    assert joint.negative_end == max(constellation(edge).negative_end for edge in edges)
