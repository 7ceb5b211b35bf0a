"""Common neighbours: plain loops, closed forms, ties and a case counted by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics.alignment import cknna, cycle_knn, find_neighborhoods, mutual_knn
from tests.support import reference_representations as reference


def unit_rows(count=17, width=4):
    return F.normalize(torch.randn(count, width, dtype=torch.float64), dim=1)


def pair(count=17):
    first = unit_rows(count)
    return first, F.normalize(first @ torch.randn(4, 6, dtype=torch.float64) + 0.4, dim=1)


@pytest.mark.parametrize("k", [2, 3, 8, 16])
def test_values_are_those_of_the_plain_loops(k):
    first, second = pair()
    found = find_neighborhoods(first, second, k, chunk_rows=5)
    assert mutual_knn(found) == pytest.approx(reference.mutual_knn(first, second, k), abs=1e-12)
    assert cycle_knn(found) == reference.cycle_knn(first, second, k)
    assert cknna(found) == pytest.approx(reference.cknna(first, second, k), rel=1e-9)


def test_a_case_counted_by_hand():
    # On a line of angles, the nearest of 0, 10, 30, 70 degrees: 1, 0, 1, 2.
    # With the last two swapped on the other side, 0, 10, 70, 30: 1, 0, 3, 1.
    def at(*degrees):
        return torch.stack(
            [torch.tensor([math.cos(math.radians(d)), math.sin(math.radians(d))]) for d in degrees]
        )

    found = find_neighborhoods(at(0, 10, 30, 70), at(0, 10, 70, 30), 1)
    assert found.first.positions[:, 0].tolist() == [1, 0, 1, 2]
    assert found.second.positions[:, 0].tolist() == [1, 0, 3, 1]
    assert mutual_knn(found) == 0.5
    # 0 -> 1 -> 0 comes back, 1 -> 0 -> 1 too, 2 -> 3 -> 2 too, 3 -> 1 -> 0 does not.
    assert cycle_knn(found) == 0.75
    turned = find_neighborhoods(at(0, 10, 70, 30), at(0, 10, 30, 70), 1)
    # 2 -> 1 -> 0 does not, 3 -> 2 -> 3 does.
    assert cycle_knn(turned) == 0.75


def test_coming_back_depends_on_the_order_of_the_sides():
    first, second = pair(40)
    there = cycle_knn(find_neighborhoods(first, second, 2))
    back = cycle_knn(find_neighborhoods(second, first, 2))
    assert there == reference.cycle_knn(first, second, 2)
    assert back == reference.cycle_knn(second, first, 2)
    assert there != back


def test_a_side_agrees_with_itself_rotated():
    first = unit_rows()
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    found = find_neighborhoods(first, 3 * first @ rotation, 5)
    assert mutual_knn(found) == 1
    assert cknna(found) == pytest.approx(1, abs=1e-8)


def test_independent_sides_share_neighbours_by_chance():
    found = find_neighborhoods(unit_rows(600, 20), unit_rows(600, 20), 10)
    assert mutual_knn(found) == pytest.approx(10 / 599, abs=0.008)
    assert abs(cknna(found)) < 0.1


def test_all_others_as_neighbours_are_the_unbiased_kernel_alignment():
    first, second = pair()
    found = find_neighborhoods(first, second, 16)
    expected = reference.kernel_alignment(first, second, reference.unbiased_hsic)
    assert cknna(found) == pytest.approx(expected, rel=1e-8)
    assert mutual_knn(found) == cycle_knn(found) == 1


def test_equal_rows_are_neighbours_in_their_order():
    rows = torch.ones(5, 3)
    found = find_neighborhoods(rows, rows, 2)
    assert found.first.positions.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("k", [0, 17])
def test_k_must_leave_something_out(k):
    with pytest.raises(UserError, match=rf"k \({k}\) must be from 1 to 16"):
        find_neighborhoods(*pair(), k)


def test_one_neighbour_has_no_kernel():
    with pytest.raises(UserError, match=r"CKNNA of 17 rows with k \(1\) is not defined"):
        cknna(find_neighborhoods(*pair(), 1))


def test_sides_of_different_length_are_refused():
    with pytest.raises(UserError, match="first_features has 17 rows and second_features 16"):
        find_neighborhoods(unit_rows(), unit_rows(16), 2)


def test_a_row_among_its_own_neighbours_would_not_pass():
    """The mistake of counting the diagonal: every row would agree with itself."""
    first, second = unit_rows(40), unit_rows(40)
    lists = zip(reference.neighbors(first, 1), reference.neighbors(second, 1), strict=True)
    with_self = [len({i, *a} & {i, *b}) / 2 for i, (a, b) in enumerate(lists)]
    assert mutual_knn(find_neighborhoods(first, second, 2)) < 0.2
    assert sum(with_self) / 40 >= 0.5
