"""Neighbours and directions are the same on 1, 2 and 3 ranks, one of them without rows."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.metrics import nearest_neighbors
from tests.support import reference_geometry
from tests.support.processes import run_ranks

pytestmark = pytest.mark.distributed

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
    local = nearest_neighbors(images, texts, 4).positions
    return {"nearest": results, "without_ids": local}


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


def test_neighbours_among_the_keys_of_one_rank_are_others():
    """The shortcut without an exchange would not pass the tests above."""
    images, texts, _ = _pairs()
    own = nearest_neighbors(images[5:], texts[5:], 4).positions + 5
    expected = reference_geometry.nearest(images, texts, 4)
    assert own.tolist() != [[p for _, p in row] for row in expected[5:]]
