"""Visits replayed as graphs: when, and that a graph is never replayed for other work.

A CPU has no graphs. The one here repeats the function that was captured, with its tensors: replayed
for others, it gives wrong numbers.
"""

import logging

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.distributed import prepare_exchange
from dist_siglip.distributed.simulate import simulated_world
from dist_siglip.losses import siglip_loss
from dist_siglip.losses.kernels.tiles import SigmoidTiles
from dist_siglip.losses.kernels.visit_graphs import (
    IDLE_PASSES,
    MOST_COUNTED,
    MOST_GRAPHS,
    WARM_UP_PASSES,
    VisitGraphs,
    graphs_for,
    key_of,
)
from dist_siglip.losses.sigmoid import SigmoidPass, SigmoidSides, Wanted


class FakeCapture:
    """Captures without working, as a GPU does; counts."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, work):
        self.captured += 1

        def replay():
            self.replayed += 1
            work()

        return replay


@pytest.fixture
def capture():
    return FakeCapture()


def test_a_visit_is_captured_after_some_passes_and_done_once_in_each(capture):
    graphs, done = VisitGraphs(capture), []
    for number in range(WARM_UP_PASSES + 3):
        for _ in range(5):  # visits of one pass are one sight of it
            graphs.visit("key", number, lambda: done.append(1))
    assert len(done) == 5 * (WARM_UP_PASSES + 3)
    assert (capture.captured, capture.replayed) == (1, 5 * 3)


def test_what_is_kept_is_bounded(capture):
    graphs = VisitGraphs(capture)
    for number in range(WARM_UP_PASSES + 1):
        for key in range(MOST_COUNTED + 10):
            graphs.visit(key, number, lambda: None)
    assert capture.captured == 0  # forgotten before they come again
    for number in range(WARM_UP_PASSES + 1):
        for key in range(MOST_GRAPHS + 2):
            graphs.visit(key, 100 + number, lambda: None)
    assert (len(graphs._replays), len(graphs._passes)) == (MOST_GRAPHS, MOST_COUNTED)


def test_graphs_in_use_do_not_drive_out_each_other_but_idle_ones_give_way(capture):
    graphs = VisitGraphs(capture)
    for number in range(2 * IDLE_PASSES):
        for key in range(MOST_GRAPHS + 8):
            graphs.visit(key, number, lambda: None)
    assert capture.captured == MOST_GRAPHS
    for number in range(2 * IDLE_PASSES, 4 * IDLE_PASSES):
        for key in range(8):
            graphs.visit(("new", key), number, lambda: None)
    assert capture.captured == MOST_GRAPHS + 8
    assert len(graphs._replays) == MOST_GRAPHS


def test_a_capture_that_fails_is_told_once_and_changes_nothing(caplog):
    def fails(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, done = VisitGraphs(fails), []
    with caplog.at_level(logging.WARNING):
        for number in range(WARM_UP_PASSES + 5):
            graphs.visit("key", number, lambda: done.append(1))
    assert len(done) == WARM_UP_PASSES + 5
    assert [record.message for record in caplog.records] == [
        "visits are not replayed as CUDA graphs: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clone(),
        lambda t: t[:3],
        lambda t: t.view(2, 4).T,
        lambda t: t.view(torch.int32),
    ],
    ids=["address", "shape", "stride", "dtype"],
)
def test_a_key_tells_every_place_apart(change):
    tensor = torch.zeros(8)
    tensor = tensor.view(4, 2) if change(tensor.view(2, 4)).ndim == 2 else tensor
    key = key_of("settings", (tensor,))
    assert key == key_of("settings", (tensor.detach(),))
    assert key != key_of("others", (tensor,))
    assert key != key_of("settings", (change(tensor.view(8)),))


def test_there_are_none_on_a_cpu_and_under_anomaly_detection(monkeypatch):
    assert graphs_for(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graphs_for(torch.device("cuda")) is not None
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        assert graphs_for(torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert graphs_for(torch.device("cuda")) is None


NUM_PASSES = WARM_UP_PASSES + 5
ELSEWHERE = WARM_UP_PASSES + 3  # pass in which one shard lies at another address


def run_passes(world):
    """What passes with the same memory give, whose shards get other numbers each time."""
    generator = torch.Generator().manual_seed(0)

    def rows():
        return F.normalize(torch.randn(4, 5, generator=generator), dim=-1)

    images, texts, found = rows(), rows(), []
    plan = prepare_exchange([texts], group=world, exchange="ring")
    ring_pass = SigmoidPass(
        SigmoidSides(False, images, texts),
        plan,
        torch.tensor(7.0),
        torch.tensor(-3.0),
        None,
        Wanted(True, True, True, True),
        (3, 3),
        "eager",
        "negative",
    )
    shards, contributions = [rows(), rows()], torch.empty(3, 4, 5)
    for number in range(NUM_PASSES):
        ring_pass._number, ring_pass._is_begun = number, False
        for total in (ring_pass.tiles._value, ring_pass.tiles._derivative_sum):
            total.zero_()
        for shard in shards:
            shard.copy_(rows())
        first = shards[0].clone() if number == ELSEWHERE else shards[0]
        for owner, shard in enumerate((texts, first, shards[1])):
            ring_pass.visit(owner, (shard,), (contributions[owner],))
        sums = ring_pass.tiles.sums()
        found.append([sums.value.clone(), ring_pass.home_gradient.clone(), contributions.clone()])
    return found


def test_replayed_passes_have_the_numbers_of_those_without_graphs(capture, monkeypatch):
    with simulated_world(3) as world:
        expected = run_passes(world)
        graphs = VisitGraphs(capture)
        monkeypatch.setattr("dist_siglip.losses.ring_pass.graphs_for", lambda _: graphs)
        # The terms of a CPU are more than launches, but this graph repeats them.
        monkeypatch.setattr(SigmoidTiles, "replayed", everything)
        found = run_passes(world)
        # Two shards in each pass, but for the one elsewhere; the own shard never.
        assert (capture.captured, capture.replayed) == (2, 2 * (NUM_PASSES - WARM_UP_PASSES) - 1)
        monkeypatch.setattr("dist_siglip.losses.ring_pass.key_of", lambda settings, _: settings)
        graphs = VisitGraphs(FakeCapture())
        broken = run_passes(world)  # one graph for all places
    for passes, is_same in ((found, True), (broken, False)):
        assert is_same == all(
            torch.equal(value, truth)
            for ours, theirs in zip(passes, expected, strict=True)
            for value, truth in zip(ours, theirs, strict=True)
        )


def everything(tiles):
    own = (tiles._scale, tiles._bias, tiles._value, tiles._derivative_sum)
    return tiles._dtype, (*own, *tiles._buffers.tensors())


@pytest.mark.gpu
def test_graphs_on_a_gpu_give_the_numbers_of_no_graphs(monkeypatch):
    results = {}
    for name in ("graphs", "none"):
        if name == "none":
            monkeypatch.setattr("dist_siglip.losses.ring_pass.graphs_for", lambda _: None)
        generator = torch.Generator(device="cuda").manual_seed(0)
        results[name] = []
        with simulated_world(8):
            for _ in range(WARM_UP_PASSES + 4):
                sides = torch.randn(2, 256, 64, generator=generator, device="cuda")
                leaves = [side.bfloat16().requires_grad_() for side in F.normalize(sides, dim=-1)]
                scalars = [torch.tensor(x, device="cuda", requires_grad=True) for x in (7.0, -3.0)]
                loss = siglip_loss(*leaves, *scalars, exchange="ring", kernel="triton")
                loss.backward()
                results[name].append([loss, *(leaf.grad for leaf in leaves + scalars)])
    for ours, theirs in zip(*results.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
