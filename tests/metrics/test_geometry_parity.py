"""Neighbours and directions are the same on 1, 2 and 3 ranks, one of them without rows."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.metrics import (
    collect_moments,
    collect_pair_statistics,
    cross_uniformity,
    hubness,
    modality_gap,
    nearest_neighbors,
    separating_direction,
)
from tests.support import reference_geometry
from tests.support.processes import run_ranks

COUNT = 19
# Rows of every rank; rank 1 of 3 has none.
COUNTS = {1: (COUNT,), 2: (5, 14), 3: (8, 0, 11)}
EXCHANGES = ("ring", "all_gather", "auto")


def _pairs():
    generator = torch.Generator().manual_seed(11)
    images = F.normalize(torch.randn(COUNT, 5, generator=generator), dim=1)
    texts = F.normalize(images + 0.4 * torch.randn(COUNT, 5, generator=generator), dim=1)
    texts[16] = texts[4]  # a tie across ranks
    return images, texts, torch.arange(COUNT) % 12


def _measure(rank, world_size):
    images, texts, ids = (column.split(COUNTS[world_size])[rank] for column in _pairs())
    results = {
        exchange: nearest_neighbors(
            images, texts, 4, query_ids=ids, key_ids=ids, chunk_rows=3, exchange=exchange
        )
        for exchange in EXCHANGES
    }
    rows = torch.arange(COUNT).split(COUNTS[world_size])[rank]
    statistics = collect_pair_statistics(
        images, texts, ids, ids, logit_scale=3.0, logit_bias=-1.0, chunk_rows=4, exchange="ring"
    )
    plane = separating_direction(images, texts, rows, max_pairs=10)
    return {
        "nearest": results,
        "without_ids": nearest_neighbors(images, texts, 4).positions,
        "moments": collect_moments(images),
        "numbers": {
            **vars(statistics.image_rows),
            **{f"text {name}": value for name, value in vars(statistics.text_rows).items()},
            "cross": cross_uniformity(statistics),
            **hubness(images, texts, 3, chunk_rows=5)._asdict(),
            **modality_gap(images, texts)._asdict(),
            "above": plane.images_above,
            "below": plane.texts_below,
            **{f"h{axis}": value for axis, value in enumerate(plane.direction.tolist())},
        },
    }


@pytest.fixture(scope="module", params=[1, 2, 3])
def everyone(request):
    """One start of the processes for all tests of a world size."""
    return run_ranks(_measure, request.param)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_neighbours_are_those_among_the_keys_of_all_ranks(everyone, exchange):
    images, texts, ids = _pairs()
    expected = reference_geometry.nearest(images, texts, 4, ids, ids)
    found = [result["nearest"][exchange] for result in everyone]
    positions = torch.cat([mine.positions for mine in found]).tolist()
    assert positions == [[p for _, p in row] for row in expected]
    similarities = torch.cat([mine.similarities for mine in found]).flatten().tolist()
    assert similarities == pytest.approx([s for row in expected for s, _ in row], abs=1e-11)


def test_neighbours_without_ids_leave_out_nothing(everyone):
    images, texts, _ = _pairs()
    expected = reference_geometry.nearest(images, texts, 4)
    positions = torch.cat([result["without_ids"] for result in everyone]).tolist()
    assert positions == [[p for _, p in row] for row in expected]


def test_numbers_are_those_of_one_process(everyone):
    alone = _measure(0, 1)
    for result in everyone:
        assert result["numbers"] == pytest.approx(alone["numbers"], rel=1e-11, abs=1e-13)
        assert result["moments"].num_rows == COUNT
        for mine, expected in zip(result["moments"][1:], alone["moments"][1:], strict=True):
            assert torch.allclose(mine, expected, atol=1e-13)


def test_every_rank_has_the_same_numbers_to_the_bit(everyone):
    assert all(result["numbers"] == everyone[0]["numbers"] for result in everyone)


def test_numbers_of_one_rank_are_others():
    """Sums and lists without a collective would not pass the tests above."""
    images, texts, ids = (column[8:] for column in _pairs())
    alone = _measure(0, 1)["numbers"]
    statistics = collect_pair_statistics(images, texts, ids, ids, logit_scale=3.0, logit_bias=-1.0)
    assert statistics.image_rows.mean != pytest.approx(alone["mean"], rel=1e-3)
    assert hubness(images, texts, 3).skewness != pytest.approx(alone["skewness"], rel=1e-3)


def test_neighbours_among_the_keys_of_one_rank_are_others():
    """The shortcut without an exchange would not pass the tests above."""
    images, texts, _ = _pairs()
    own = nearest_neighbors(images[5:], texts[5:], 4).positions + 5
    expected = reference_geometry.nearest(images, texts, 4)
    assert own.tolist() != [[p for _, p in row] for row in expected[5:]]
