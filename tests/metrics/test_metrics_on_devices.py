"""Metrics on a device are those of the CPU, and wait for it once for a shard."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.metrics import (
    collect_pair_statistics,
    evaluate_pairs,
    modality_gap,
    nearest_neighbors,
    retrieval_ranks_both_ways,
    uniformity,
)
from dist_siglip.metrics.retrieval.positives import PositivePairs
from tests.support.devices import on_devices

COUNT, WIDTH = 96, 24


def pairs(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    images = F.normalize(torch.randn(COUNT, WIDTH, generator=generator), dim=1)
    texts = F.normalize(images + torch.randn(COUNT, WIDTH, generator=generator), dim=1)
    texts[1::8] = texts[::8]  # ties
    return images.to(device, dtype), texts.to(device, dtype), torch.arange(COUNT, device=device)


def of_rows(device):
    ids = torch.arange(COUNT)
    found = torch.stack([torch.cat([ids, ids]), torch.cat([ids, (ids + 3) % COUNT])], dim=1)
    return PositivePairs(found.unique(dim=0).to(device))


def ranks(device, dtype, positives=None, chunk_rows=40):
    images, texts, ids = pairs(device, dtype)
    return retrieval_ranks_both_ways(
        images, texts, ids, ids, positives=positives, chunk_rows=chunk_rows
    )


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_ranks_are_those_of_float64(dtype, device):
    images, texts, _ = pairs("cpu", dtype)
    scores = images.double() @ texts.double().T
    own = scores.diagonal()
    slack = 1e-9 * (1 + own.abs())
    found = ranks(device, dtype)
    assert found[0].tolist() == (scores >= (own - slack)[:, None]).sum(dim=1).tolist()
    assert found[1].tolist() == (scores >= (own - slack)[None]).sum(dim=0).tolist()


@on_devices
def test_ranks_of_several_captions_are_those_of_the_cpu(device):
    for one, other in zip(
        ranks(device, torch.float32, of_rows(device)),
        ranks("cpu", torch.float32, of_rows("cpu"), chunk_rows=COUNT),
        strict=True,
    ):
        assert one.tolist() == other.tolist()


@on_devices
def test_equal_features_are_ranked_last(device):
    """All products are open: float64 decides whole rectangles."""
    features = F.normalize(torch.linspace(0.1, 3.7, WIDTH), dim=0).repeat(COUNT, 1).to(device)
    ids = torch.arange(COUNT, device=device)
    for found in retrieval_ranks_both_ways(features, features, ids, ids, chunk_rows=40):
        assert found.tolist() == [COUNT] * COUNT


@on_devices
@pytest.mark.parametrize("k", [1, 7, 200])
def test_neighbours_are_those_of_the_cpu(k, device):
    images, texts, _ = pairs(device)
    found = nearest_neighbors(images, texts, k, chunk_rows=40)
    expected = nearest_neighbors(*pairs("cpu")[:2], k, chunk_rows=COUNT)
    assert torch.equal(found.positions.cpu(), expected.positions)
    assert torch.equal(found.similarities.cpu(), expected.similarities)


@on_devices
def test_statistics_of_pairs_are_those_of_the_cpu(device):
    def collect(where, chunk_rows):
        images, texts, ids = pairs(where)
        return collect_pair_statistics(
            images, texts, ids // 2, ids // 2, logit_scale=10.0, logit_bias=-5.0,
            chunk_rows=chunk_rows,
        )  # fmt: skip

    found, expected = collect(device, 40), collect("cpu", COUNT)
    assert found.other_softplus_sum == pytest.approx(expected.other_softplus_sum, rel=1e-12)
    for one, other in ((found.positive, expected.positive), (found.negative, expected.negative)):
        assert (one.count, one.minimum, one.maximum) == pytest.approx(
            (other.count, other.minimum, other.maximum), abs=1e-14
        )
        assert torch.equal(one.histogram, other.histogram)
        torch.testing.assert_close(one.cosines, other.cosines, atol=1e-14, rtol=0)


@on_devices
def test_gap_and_uniformity_are_those_of_the_cpu(device):
    images, texts, _ = pairs(device)
    ours, theirs = modality_gap(images, texts), modality_gap(*pairs("cpu")[:2])
    assert ours.centroid_distance == pytest.approx(theirs.centroid_distance, abs=1e-12)
    spread = uniformity(images, chunk_rows=40)
    assert spread == pytest.approx(uniformity(pairs("cpu")[0]), abs=1e-12)


@on_devices
def test_an_evaluation_is_that_of_the_cpu(device):
    def evaluate(where):
        images, texts, ids = pairs(where)
        return evaluate_pairs(
            images, texts, ids, ids, ids, logit_scale=10.0, logit_bias=-5.0, chunk_rows=40
        )

    found, expected = evaluate(device).metrics, evaluate("cpu").metrics
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ranks", "several captions", "statistics", "neighbours"])
def test_more_rectangles_cost_no_more_waits(name):
    images, texts, ids = pairs("cuda")
    calls = {
        "ranks": lambda side: ranks("cuda", torch.float32, chunk_rows=side),
        "several captions": lambda side: ranks("cuda", torch.float32, of_rows("cuda"), side),
        "statistics": lambda side: collect_pair_statistics(
            images, texts, ids, ids, logit_scale=10.0, logit_bias=-5.0, chunk_rows=side
        ),
        "neighbours": lambda side: nearest_neighbors(images, texts, 5, chunk_rows=side),
    }
    waits = []
    for side in (COUNT // 2, COUNT // 8):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                calls[name](side)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(each.message) for each in seen))
    assert waits[0] == waits[1]
