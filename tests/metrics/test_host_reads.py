"""A rectangle of similarities never makes the host wait: what is read is read once for a shard."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.metrics import (
    collect_pair_statistics,
    nearest_neighbors,
    retrieval_ranks_both_ways,
    uniformity,
)
from dist_siglip.metrics.retrieval import narrow_counts
from dist_siglip.metrics.retrieval.positives import PositivePairs
from tests.support import metric_reference
from tests.support.host_reads import HostReads

COUNT, WIDTH = 48, 8


def make_pairs(count=COUNT, width=WIDTH):
    images = F.normalize(torch.randn(count, width), dim=1)
    texts = F.normalize(images + 0.5 * torch.randn(count, width), dim=1)
    return images, texts, torch.arange(count) // 2, torch.arange(count) // 2


def of_rows():
    """Every picture has two captions, and every third caption a second picture."""
    ids = torch.arange(COUNT)
    pairs = torch.stack([torch.cat([ids, ids]), torch.cat([ids, (ids + 3) % COUNT])], dim=1)
    return PositivePairs(pairs.unique(dim=0))


def by_rows(chunk_rows):
    images, texts, _, _ = make_pairs()
    ids = torch.arange(COUNT)
    return retrieval_ranks_both_ways(
        images, texts, ids, ids, positives=of_rows(), chunk_rows=chunk_rows
    )


MEASURES = {
    "ranks": lambda side: retrieval_ranks_both_ways(*make_pairs(), chunk_rows=side),
    "ranks of several captions": by_rows,
    "statistics": lambda side: collect_pair_statistics(
        *make_pairs(), logit_scale=10.0, logit_bias=-5.0, chunk_rows=side
    ),
    "neighbours": lambda side: nearest_neighbors(*make_pairs()[:2], 5, chunk_rows=side),
    "uniformity": lambda side: uniformity(make_pairs()[0], chunk_rows=side),
}


@pytest.fixture
def _as_on_a_device(monkeypatch):
    """Choose what a device would be given, where CPUs have something faster."""
    monkeypatch.setattr(torch, "bincount", scattered_bincount)
    monkeypatch.setattr(
        torch.Tensor, "nonzero", lambda mask: mask.nonzero_static(size=mask.numel())
    )


def scattered_bincount(values, minlength):
    one = values.new_ones(()).expand(len(values))
    return values.new_zeros(minlength).scatter_add_(0, values, one)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.usefixtures("_as_on_a_device")
def test_no_rectangle_is_waited_for(name):
    """Nine times as many rectangles, no read more."""
    reads = []
    for side in (COUNT // 2, COUNT // 6):
        torch.manual_seed(0)
        with HostReads() as seen:
            MEASURES[name](side)
        reads.append(seen.names)
    assert len(reads[0]) == len(reads[1]), reads


def test_a_read_in_each_rectangle_is_seen():
    tiles = torch.ones(4, 3)
    with HostReads() as seen:
        for tile in tiles:
            _ = bool((tile > 0).any()), tile[tile > 0]
    assert sorted(seen.names) == ["aten::_local_scalar_dense"] * 4 + ["mask"] * 4


@pytest.mark.parametrize("most", [0, 1, 4])
@pytest.mark.parametrize("static", [False, True])
def test_near_ties_are_decided_in_float64(most, static, monkeypatch):
    """Differences far below float32, and more of them than the list holds."""
    monkeypatch.setattr(narrow_counts, "_OPEN_PER_ROW", most)
    if static:
        monkeypatch.setattr(
            torch.Tensor, "nonzero", lambda mask: mask.nonzero_static(size=mask.numel())
        )
    images, texts, _, _ = make_pairs(40, 384)
    images, texts = images.double(), texts.double()
    texts[1::2] = F.normalize(texts[::2] + 1e-8 * torch.randn(20, 384).double(), dim=1)
    images[1::2] = images[::2]
    ids = torch.arange(40)
    found = retrieval_ranks_both_ways(images, texts, ids, ids, chunk_rows=16)
    assert found[0].tolist() == metric_reference.ranks(images, texts, ids, ids)
    assert found[1].tolist() == metric_reference.ranks(texts, images, ids, ids)


def test_float32_alone_would_decide_otherwise():
    """What the test above looks for: the ranks of float32 products differ."""
    torch.manual_seed(0)
    images, texts, _, _ = make_pairs(40, 384)
    images, texts = images.double(), texts.double()
    texts[1::2] = F.normalize(texts[::2] + 1e-8 * torch.randn(20, 384).double(), dim=1)
    narrow, wide = images.float() @ texts.float().T, images @ texts.T
    ahead = [(s >= s.diagonal()[:, None]).sum(dim=1) for s in (narrow, wide)]
    assert not torch.equal(*ahead)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_neither_tf32_nor_autocast_has_a_part(precision):
    images, texts, ids, _ = make_pairs(200, 64)
    ids = torch.arange(200)
    expected = retrieval_ranks_both_ways(images, texts, ids, ids)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", torch.bfloat16):
            found = retrieval_ranks_both_ways(images, texts, ids, ids)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
