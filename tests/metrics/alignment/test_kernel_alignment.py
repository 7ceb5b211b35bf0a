"""CKA from second moments: the Gram matrices, closed forms, and what must change nothing."""

import math

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.metrics.alignment import cka, collect_moments, unbiased_cka
from tests.support import reference_representations as reference

BOTH = [cka, unbiased_cka]


def rows(count=14, width=5, shift=0.7):
    return torch.randn(count, width, dtype=torch.float64) + shift


def related(first, width=3, noise=0.6):
    mixed = first @ torch.randn(first.shape[1], width, dtype=torch.float64)
    return mixed + noise * torch.randn(len(first), width, dtype=torch.float64)


@pytest.mark.parametrize(
    ("measure", "hsic"), [(cka, reference.biased_hsic), (unbiased_cka, reference.unbiased_hsic)]
)
def test_values_are_those_of_the_gram_matrices(measure, hsic):
    first = rows()
    second = related(first)
    expected = reference.kernel_alignment(first, second, hsic)
    assert measure(collect_moments(first, second)) == pytest.approx(expected, rel=1e-11)


def test_the_unbiased_estimate_is_the_mean_over_quadruples_of_distinct_rows():
    first = rows(count=6)
    second = related(first)
    expected = reference.kernel_alignment(first, second, reference.brute_unbiased_hsic)
    assert unbiased_cka(collect_moments(first, second)) == pytest.approx(expected, rel=1e-10)


def test_a_case_counted_by_hand():
    # Centred already: |X'Y|^2 = 2^2 = 4, |X'X|^2 = 2^2 + 2^2 = 8, |Y'Y|^2 = 2^2 = 4.
    first = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    second = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    moments = collect_moments(first, second)
    assert cka(moments) == pytest.approx(4 / math.sqrt(8 * 4), abs=1e-12)
    # |block|^2 - q + ab / 6 - q: 4 - 2 + 8 / 6 - 2, 8 - 4 + 16 / 6 - 4, 4 - 2 + 4 / 6 - 2.
    expected = (4 / 3) / math.sqrt((8 / 3) * (2 / 3))
    assert unbiased_cka(moments) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", BOTH)
def test_rotation_scale_and_shift_change_nothing(measure):
    first = rows()
    second = related(first)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    moved = 7 * first @ rotation - 20
    expected = measure(collect_moments(first, second))
    assert measure(collect_moments(moved, second)) == pytest.approx(expected, rel=1e-10)
    assert measure(collect_moments(first, moved)) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("measure", BOTH)
def test_swapping_the_sides_changes_nothing(measure):
    first = rows()
    second = related(first)
    there, back = collect_moments(first, second), collect_moments(second, first)
    assert measure(there) == pytest.approx(measure(back), rel=1e-12)


def test_a_map_that_is_no_rotation_changes_the_value():
    first = rows()
    stretched = first * torch.tensor([9.0, 1, 1, 1, 1], dtype=torch.float64)
    assert cka(collect_moments(first, stretched)) < 0.9


def test_independent_sides_are_at_zero_only_without_bias():
    moments = collect_moments(rows(300, 150, 0), rows(300, 150, 0))
    # tr(KHLH) of independent Gaussians: N D E over sqrt(N D (N + D) N E (N + E)).
    assert cka(moments) == pytest.approx(150 / 450, abs=0.02)
    assert abs(unbiased_cka(moments)) < 0.02


def test_the_six_zeros_that_others_add_lower_values_of_unit_rows():
    """Why a published value may be a little below ours."""
    first = torch.nn.functional.normalize(rows(40, 30, 0), dim=1)
    second = torch.nn.functional.normalize(related(first, 30, 0.1), dim=1)
    ours = unbiased_cka(collect_moments(first, second))
    theirs = reference.kernel_alignment(first, second, reference.unbiased_hsic, added=1e-6)
    assert 0 < 1 - theirs / ours < 1e-4


@pytest.mark.parametrize("measure", BOTH)
def test_a_side_without_spread_has_no_value(measure):
    assert math.isnan(measure(collect_moments(rows(), torch.ones(14, 2))))


def test_fewer_than_four_rows_have_no_unbiased_value():
    with pytest.raises(UserError, match="unbiased CKA of 3 rows is not defined; give at least 4"):
        unbiased_cka(collect_moments(rows(3), rows(3)))


def test_small_differences_on_top_of_a_large_mean_are_kept():
    first = rows(shift=0)
    far = (first + 1000).float()
    expected = cka(collect_moments(first, related(first, noise=0)))
    assert math.isfinite(expected)
    assert cka(collect_moments(far, first)) == pytest.approx(1, abs=1e-6)
    # One pass over rows that are not centred would be left with rounding.
    naive = far.T @ far - len(far) * far.mean(0).outer(far.mean(0))
    centered = far.double() - far.double().mean(0)
    assert not torch.allclose(naive.double(), centered.T @ centered, rtol=0.01)
