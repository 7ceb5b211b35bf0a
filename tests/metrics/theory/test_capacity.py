"""Bounds on pairs, dimension and margin: published numbers, closed forms, inverse functions."""

import math

import pytest

from dist_siglip.errors import UserError
from dist_siglip.metrics.capacity import (
    capacity_alpha,
    capacity_exponents,
    find_capacity_problem,
    largest_margin,
    largest_pairs,
    margin_of_dimension,
    required_dimension,
)


@pytest.mark.parametrize(
    ("margin", "relative_bias", "necessary", "sufficient"),
    # The second row is so400m-384 by means (Table 6): 54.4 dimensions.
    [(0.1, 0.0, 46, 89), (0.0695, 0.068, 33, 55), (0.2, 0.0, 114, 391)],
)
def test_dimensions_of_ten_billion_pairs(margin, relative_bias, necessary, sufficient):
    assert required_dimension(1e10, margin, relative_bias) == (necessary, sufficient)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9])
def test_alpha_of_a_code_used_on_both_sides_is_that_of_the_code(alpha):
    assert capacity_alpha((1 - alpha) / 2, (1 + alpha) / 2) == pytest.approx(alpha)


def test_exponents_are_those_of_the_theorems():
    # alpha = 1/2 at (1/4, 3/4).
    assert capacity_exponents(0.25, 0.75) == pytest.approx(
        (-math.log(3 / 4) / 2, -math.log(1 / 2) / 2)
    )


def test_largest_number_of_pairs_is_the_inverse_of_the_dimension():
    reached, bound = largest_pairs(89, 0.1, 0.0)
    assert reached >= 10 > largest_pairs(88, 0.1, 0.0).log10_reached
    assert largest_pairs(46, 0.1, 0.0).log10_bound >= 10 > largest_pairs(45, 0.1, 0.0).log10_bound
    assert bound > reached


def test_numbers_of_pairs_do_not_overflow():
    # More than 10^308 pairs is no float any more.
    assert largest_pairs(100_000, 0.01, 0.0).log10_bound > 10_000
    assert required_dimension(10**400, 0.1, 0.0).necessary > 1800


def test_margin_of_a_dimension_is_the_inverse_of_the_required_dimension():
    for which, margin in enumerate(reversed(margin_of_dimension(1e6, 300, 0.1))):
        assert required_dimension(1e6, margin - 1e-9, 0.1)[which] == 300
        assert required_dimension(1e6, margin + 1e-6, 0.1)[which] == 301


@pytest.mark.parametrize("num_pairs", [2, 3, 100])
def test_largest_margin_of_all_biases_is_that_of_a_simplex(num_pairs):
    margin = 1 / (2 - 2 / num_pairs)
    assert largest_margin(1 - margin, num_pairs) == pytest.approx(margin)
    for shift in (-0.01, 0.01):
        if 1 - margin + shift <= 1:
            assert largest_margin(1 - margin + shift, num_pairs) < margin


def test_full_gaps_printed_as_margins_would_break_theorem_3_4():
    # Paper 1 prints up to 0.61 for 100 pairs: the full gap, since no margin exceeds 0.5051.
    assert max(largest_margin(b / 1000, 100) for b in range(-1000, 1001)) < 0.5051


@pytest.mark.parametrize(
    ("margin", "bias", "words"),
    [
        (-0.1, 0.0, "above 0"),
        (math.nan, 0.0, "above 0"),
        (0.1, 1.5, r"relative bias \(1.5\)"),
        (0.4, 0.7, "at most 0.3 "),
        (0.35, 0.0, "at most 0.3333"),
    ],
)
def test_margins_out_of_range_are_refused_with_the_range(margin, bias, words):
    with pytest.raises(UserError, match=words):
        capacity_exponents(margin, bias)


def test_few_pairs_may_have_margins_that_growing_numbers_cannot():
    assert find_capacity_problem(0.34, 0.0) is not None
    assert find_capacity_problem(0.34, 0.0, 3) is None


def test_margin_without_exponential_growth_has_no_dimension():
    with pytest.raises(UserError, match="grow exponentially"):
        required_dimension(10, 0.5, 0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: required_dimension(1, 0.1, 0.0),
        lambda: largest_pairs(0, 0.1, 0.0),
        lambda: margin_of_dimension(10, 0, 0.0),
        lambda: largest_margin(-1.1),
    ],
)
def test_impossible_arguments_are_refused(call):
    with pytest.raises(UserError, match="must be"):
        call()
