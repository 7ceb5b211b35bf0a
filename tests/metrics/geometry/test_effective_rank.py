import math

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.metrics.geometry.spread import effective_rank
from tests.support.processes import run_ranks


def rows_of(num_rows=13, width=5):
    torch.manual_seed(2)
    return torch.randn(num_rows, width, dtype=torch.float64) * torch.arange(1, width + 1)


def reference(rows):
    """RankMe, equation 1, from the singular values of the matrix itself."""
    singular = torch.linalg.svdvals(rows.double()).tolist()
    total = sum(singular)
    return math.exp(-sum(s / total * math.log(s / total) for s in singular if s > 0))


def test_it_is_that_of_the_paper():
    assert effective_rank(rows_of()) == pytest.approx(reference(rows_of()), rel=1e-10)


@pytest.mark.parametrize(("num_rows", "span"), [(3, 3), (40, 3), (1, 1)])
def test_directions_without_rows_do_not_count(num_rows, span):
    """Thousands of eigenvalues that are rounding: their roots, 1e-8 each, would."""
    rows = rows_of(num_rows, span) @ torch.randn(span, 512, dtype=torch.float64)
    singular = torch.linalg.svdvals(rows)[:span]
    shares = singular / singular.sum()
    expected = math.exp(-float((shares * shares.log()).sum()))
    assert effective_rank(rows) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("rows", "rank"), [(torch.eye(6), 6.0), (torch.ones(4, 3), 1.0)])
def test_known_spreads(rows, rank):
    assert effective_rank(rows) == pytest.approx(rank, rel=1e-6)


def test_a_collapse_onto_few_directions_shows():
    rows = rows_of(40, 8)
    collapsed = rows @ torch.diag(torch.tensor([1.0, 1.0] + [1e-4] * 6).double())
    assert effective_rank(collapsed) < 2.1 < effective_rank(rows)


def _share(rank, world_size):
    counts = {2: (13, 0), 3: (5, 1, 7)}[world_size]
    return effective_rank(rows_of().split(counts)[rank])


@pytest.mark.parametrize("world_size", [2, 3])
def test_uneven_ranks_find_that_of_all_rows(world_size):
    found = run_ranks(_share, world_size)
    assert found == pytest.approx([reference(rows_of())] * world_size, rel=1e-10)


def test_a_number_that_is_not_finite_is_named():
    rows = rows_of()
    rows[3, 1] = math.nan
    with pytest.raises(UserError, match="features"):
        effective_rank(rows)
