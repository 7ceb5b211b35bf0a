"""Alignment is the same number on 1, 2 and 3 ranks, with uneven rows and an empty rank."""

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.metrics.alignment import (
    estimate_alignment,
    find_neighborhoods,
    mean_direction,
    measure_alignment,
)
from tests.support.processes import run_ranks

COUNTS = {1: (25,), 2: (4, 21), 3: (9, 0, 16)}
ESTIMATE = {"center": True, "num_rows": 14, "num_parts": 2, "k": 3, "svcca_dimensions": 3}


def _sides():
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(25, 6, generator=generator) + 1
    second = first @ torch.randn(6, 4, generator=generator)
    second[4] = second[20]  # a tie between rows of different ranks
    return first, second


def _refusal(call, *args, **settings):
    try:
        call(*args, **settings)
    except UserError as error:
        return str(error)
    return "no error"


def _measure(rank, world_size):
    counts = COUNTS[world_size]
    start = sum(counts[:rank])
    first, second = (side[start : start + counts[rank]] for side in _sides())
    last = rank == world_size - 1
    broken = first.clone()
    if last:
        broken[2, 0] = torch.nan
    return {
        "measured": measure_alignment(first, second, k=3, svcca_dimensions=3),
        "estimated": estimate_alignment(first, second, **ESTIMATE),
        "mean": mean_direction(first),
        "neighbors": find_neighborhoods(first, second, 3, exchange="ring").second.positions,
        "nan": _refusal(measure_alignment, broken, second, k=3),
        "uneven": _refusal(measure_alignment, first, second[: -1 if last else None], k=3),
        "wide": _refusal(measure_alignment, first, second[:, : 3 if last else 4], k=3),
        "k": _refusal(measure_alignment, first, second, k=25),
        "empty": _refusal(measure_alignment, first[:0], second[:0]),
    }


@pytest.fixture(scope="module")
def single():
    return _measure(0, 1)


@pytest.fixture(scope="module", params=[2, 3])
def everyone(request):
    return run_ranks(_measure, request.param)


def test_every_measure_is_that_of_one_process(single, everyone):
    for result in everyone:
        assert result["measured"] == pytest.approx(single["measured"], rel=1e-10)
        assert torch.equal(result["neighbors"], single["neighbors"])
        assert torch.allclose(result["mean"], single["mean"], atol=1e-15)


def test_random_parts_and_shuffles_are_those_of_one_process(single, everyone):
    for result in everyone:
        for mine, expected in zip(result["estimated"], single["estimated"], strict=True):
            assert mine == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_every_rank_has_the_same_numbers(everyone):
    assert all(result["measured"] == everyone[0]["measured"] for result in everyone)
    assert all(result["estimated"] == everyone[0]["estimated"] for result in everyone)


def test_averages_over_ranks_would_not_pass(single):
    first, second = _sides()
    parts = [measure_alignment(first[rows], second[rows], k=3) for rows in (slice(9), slice(9, 25))]
    average = sum(part.mutual_knn for part in parts) / 2
    assert abs(average - single["measured"].mutual_knn) > 0.02


def test_unusable_sides_are_refused_on_every_rank_by_name(everyone):
    last = len(everyone) - 1
    for result in everyone:
        assert "row 2 holds a value that is not finite; the model has diverged" in result["nan"]
        assert f"(rank {last})" in result["nan"]
        assert "second_features" in result["uneven"]
        assert "embedding sizes" in result["wide"]
        assert "k (25) must be from 1 to 24" in result["k"]
        assert "there are no rows to compare" in result["empty"]
