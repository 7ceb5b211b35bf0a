"""The gap family: plain loops, closed forms and invariances."""

import math

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.metrics import modality_gap
from tests.support import metric_reference


def _cloud(count=200, dim=64):
    return F.normalize(torch.randn(count, dim, dtype=torch.float64), dim=1)


def test_all_measures_match_the_plain_loop():
    images, texts = _cloud(9, 4), _cloud(9, 4)
    expected = metric_reference.gap(images, texts)
    assert modality_gap(images, texts)._asdict() == pytest.approx(expected, rel=1e-12)


def test_identical_clouds_have_no_gap():
    cloud = _cloud()
    gap = modality_gap(cloud, cloud)
    assert gap.centroid_distance == 0
    assert gap.relative_modality_gap == 0
    assert gap.mean_pair_distance == 0
    assert gap.alignment == 0
    assert gap.positive_cosine == pytest.approx(1, abs=1e-12)


def test_antipodal_point_masses_have_the_largest_gap():
    images = torch.tensor([[0.6, 0.8]]).repeat(5, 1)
    gap = modality_gap(images, -images)
    assert gap.centroid_distance == pytest.approx(2, abs=1e-6)
    assert gap.relative_modality_gap == pytest.approx(1, abs=1e-6)
    assert gap.alignment == pytest.approx(4, abs=1e-5)
    assert gap.image_cosine == pytest.approx(1, abs=1e-6)


def test_independent_isotropic_clouds_have_relative_gap_one_half():
    gap = modality_gap(_cloud(2000), _cloud(2000))
    assert gap.relative_modality_gap == pytest.approx(0.5, abs=0.005)
    assert gap.centroid_distance < 0.1
    assert gap.mean_pair_distance == pytest.approx(math.sqrt(2), abs=0.02)


def test_rotating_both_modalities_changes_nothing():
    images, texts = _cloud(50, 8), _cloud(50, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    turned = modality_gap(images @ rotation, texts @ rotation)
    assert tuple(turned) == pytest.approx(tuple(modality_gap(images, texts)), rel=1e-10)


def test_swapping_modalities_swaps_only_their_cones():
    images, texts = _cloud(30, 8), _cloud(30, 8)
    there, back = modality_gap(images, texts), modality_gap(texts, images)
    swapped = {
        name: name.replace("image", "TEXT").replace("text", "image").replace("TEXT", "text")
        for name in there._fields
    }
    expected = {name: getattr(back, other) for name, other in swapped.items()}
    assert there._asdict() == pytest.approx(expected, rel=1e-12)


def test_one_pair_or_one_point_has_no_relative_gap():
    one = torch.tensor([[1.0, 0.0]])
    assert math.isnan(modality_gap(one, one).relative_modality_gap)
    assert math.isnan(modality_gap(one.repeat(4, 1), one.repeat(4, 1)).relative_modality_gap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 512])
@pytest.mark.parametrize("count", [2, 3, 1000])
def test_one_point_is_one_point_in_every_dtype(dtype, width, count):
    point = F.normalize(torch.randn(1, width), dim=1).to(dtype).repeat(count, 1)
    gap = modality_gap(point, point)
    assert math.isnan(gap.relative_modality_gap)
    assert gap.positive_cosine == pytest.approx(1, abs=1e-12)
    assert gap.image_cosine == pytest.approx(1, abs=1e-12)
    assert modality_gap(point, -point).relative_modality_gap == pytest.approx(1, abs=1e-12)


def test_float32_features_are_summed_wide():
    # One cone: |sum x|^2 - sum |x|^2 cancels badly in float32.
    cone = F.normalize(torch.ones(3000, 16) + 1e-3 * torch.randn(3000, 16), dim=1)
    wide = modality_gap(F.normalize(cone.double(), dim=1), cone.double()).image_cosine
    assert modality_gap(cone, cone).image_cosine == pytest.approx(wide, abs=1e-14)


def test_texts_that_are_images_moved_by_one_vector_have_no_xi():
    # Images on a circle at one height, texts on the same circle at another.
    circle = 0.8 * _cloud(40, 2)
    height = torch.full((40, 1), 0.6, dtype=torch.float64)
    images, texts = (torch.cat([circle, sign * height], dim=1) for sign in (1, -1))
    gap = modality_gap(images, texts)
    assert (gap.xi, gap.xi_unsquared) == pytest.approx((0, 0), abs=1e-12)
    assert modality_gap(images, texts.roll(1, 0)).xi > 0.5


def test_xi_is_what_the_centroids_leave_of_the_alignment():
    # Table 4 of Bangachev et al., so400m-384: mean of squared norms 1.7249, of the mean 1.1162.
    assert pytest.approx(0.6086, abs=2e-4) == 1.7249 - 1.1162
    images, texts = _cloud(30, 8), _cloud(30, 8)
    gap = modality_gap(images, texts)
    assert gap.xi == pytest.approx(gap.alignment - gap.centroid_distance**2)


def test_more_rows_than_one_part_are_the_same_numbers(monkeypatch):
    images, texts = _cloud(70, 8), _cloud(70, 8)
    whole = modality_gap(images, texts)
    monkeypatch.setattr("dist_siglip.metrics.tiles._SUMMED_ROWS", 16)
    assert tuple(modality_gap(images, texts)) == pytest.approx(tuple(whole), rel=1e-12)
