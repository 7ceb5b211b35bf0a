"""One rank of a simulated world: the choices, the numbers and the memory of a large one."""

import logging
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dist_siglip.bench.simulate import LiveBytes
from dist_siglip.distributed import AccumulatorSpec, circulate, groups, prepare_exchange, ring
from dist_siglip.distributed.exchange import _fastest
from dist_siglip.distributed.groups import transfers_of
from dist_siglip.distributed.p2p import P2PChannel
from dist_siglip.distributed.simulate import simulated_world
from dist_siglip.distributed.speeds import Speeds
from dist_siglip.errors import UserError
from dist_siglip.losses import siglip_loss
from dist_siglip.losses.ring_pass import RingPass
from tests.support.reference import sigmoid_loss_and_gradients

TRAVELLING = ("ring", "two_way", "two_level", "node_gather")
SCALE, BIAS = 7.0, -3.0


def _features(num_pairs, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_pairs)
    both = torch.randn(2, num_pairs, width, generator=generator, dtype=torch.float64)
    return tuple(F.normalize(side, dim=-1).to(dtype).requires_grad_() for side in both)


def _step(images, texts, **settings):
    scale, bias = torch.tensor(SCALE).to(images), torch.tensor(BIAS).to(images)
    scale.requires_grad_()
    bias.requires_grad_()
    loss = siglip_loss(images, texts, scale, bias, **settings)
    loss.backward()
    return {"loss": loss.detach(), "image": images.grad, "text": texts.grad, "scale": scale.grad}


# Every rank of the simulated world holds the same pairs, so one process can hold them all.
@pytest.mark.parametrize("exchange", TRAVELLING)
def test_numbers_are_those_of_equal_ranks(exchange):
    images, texts = _features(4, 5)
    with simulated_world(6, rank=4, local_world_size=3):
        found = _step(images, texts, exchange=exchange, chunk_rows=3)
    truth = sigmoid_loss_and_gradients(
        images.detach().repeat(6, 1), texts.detach().repeat(6, 1), SCALE, BIAS
    )
    assert torch.allclose(found["loss"], truth["loss"], rtol=1e-12)
    assert torch.allclose(found["scale"], truth["scale"], rtol=1e-12)
    for side in ("image", "text"):  # the loss of a rank is W times its part of the global one
        assert torch.allclose(found[side], 6 * truth[side][:4], rtol=1e-12, atol=1e-14)


def test_a_hop_posts_one_batch_of_transfers(monkeypatch):
    """Accumulators leave together with the shard that was visited after theirs."""
    posted = []
    post = P2PChannel.post

    def record(channel, outgoing, arriving):
        posted.append(len(outgoing))
        return post(channel, outgoing, arriving)

    monkeypatch.setattr(P2PChannel, "post", record)
    images, texts = _features(4, 5)
    with simulated_world(6):
        _step(images, texts, exchange="ring")
    # The first shard, then accumulators beside a shard, at last accumulators that come home.
    assert posted == [1, 2, 2, 2, 2, 1, 1]


class Operations(TorchDispatchMode):
    """Number of operations inside the block."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def _work(world_size):
    """Operations, and calls of Python and C, of a forward."""
    images, texts = _features(8, 16, torch.float32)
    calls = 0

    def note(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    with simulated_world(world_size):
        _step(images, texts, exchange="ring")
        with Operations() as operations:
            _step(images, texts, exchange="ring")
        sys.setprofile(note)
        try:
            _step(images, texts, exchange="ring")
        finally:
            sys.setprofile(None)
    return operations.count, calls


def test_the_work_of_a_hop_on_the_host_is_bounded():
    """Time on a busy machine says nothing.

    36 operations and 357 calls took 182 microseconds, 20 and 136 take 101.
    """
    (few, few_calls), (many, many_calls) = _work(8), _work(40)
    assert (many - few) / 32 <= 22
    assert (many_calls - few_calls) / 32 <= 150


@pytest.mark.parametrize("exchange", ["ring", "two_way"])
def test_a_training_keeps_the_memory_of_its_ring_and_gives_its_results_away(exchange, monkeypatch):
    """Two steps before any backward: the second must not write over gradients of the first."""
    places = []
    visit = RingPass.visit

    def note(ring_pass, owner, shard, contributions):
        places.append([tensor.data_ptr() for tensor in (*shard[1:], *contributions)])
        return visit(ring_pass, owner, shard, contributions)

    monkeypatch.setattr(RingPass, "visit", note)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (SCALE, BIAS)]
    steps = [_features(4, 5), _features(4, 6)[::-1]]
    steps = [[side[:, :5].detach().requires_grad_() for side in pair] for pair in steps]
    with simulated_world(6):
        losses = [siglip_loss(*pair, *scalars, exchange=exchange) for pair in steps]
        for loss in losses:
            loss.backward()
        with torch.no_grad():  # not a step of a training: it takes no memory with it
            siglip_loss(*steps[0], *scalars, exchange=exchange)
        channel = transfers_of(dist.group.WORLD, torch.device("cpu")).channel
        assert len(ring._kept[channel]) == 1
    assert places[:6] == places[6:12]
    for pair in steps:
        truth = sigmoid_loss_and_gradients(
            *(side.detach().repeat(6, 1) for side in pair), SCALE, BIAS
        )
        for side, name in zip(pair, ("image", "text"), strict=True):
            assert torch.allclose(side.grad, 6 * truth[name][:4], rtol=1e-12, atol=1e-14)


def _peak(world_size, exchange, *, width=32, num_pairs=64):
    images, texts = _features(num_pairs, width, torch.float32)
    local = 2 if exchange in ("two_level", "node_gather") else 1
    world = simulated_world(world_size, local_world_size=local, max_visits=4)
    with world, LiveBytes() as counter:
        _step(images, texts, exchange=exchange, chunk_rows=32)
    return counter.peak


@pytest.mark.parametrize("exchange", TRAVELLING)
def test_memory_does_not_grow_with_the_number_of_ranks(exchange):
    # two_way has its second path from three ranks on.
    sizes = (2, 3, 4, 8, 64, 256) if exchange == "ring" else (4, 6, 8, 64, 256)
    peaks = [_peak(world_size, exchange) for world_size in sizes]
    assert max(peaks) <= 1.05 * min(peaks), peaks


def test_the_comparison_sees_memory_that_grows():
    assert _peak(64, "all_gather") > 4 * _peak(8, "all_gather")


def test_skipped_visits_contribute_zero():
    visited = []

    def visit(owner, shard, contributions):
        visited.append(owner)
        contributions[0].fill_(1.0)

    spec = [AccumulatorSpec((), torch.float32)]
    with simulated_world(8, rank=3, max_visits=2):
        (home,) = circulate([torch.ones(2)], visit, accumulators=spec, exchange="ring")
    assert visited == [3, 2]
    assert home.tolist() == [2.0, 2.0]


def _chosen(world_size, rows, width, caplog, **nodes):
    _fastest.cache_clear()
    caplog.clear()
    with simulated_world(world_size, **nodes), caplog.at_level(logging.INFO):
        names = {prepare_exchange([torch.empty(rows, width)]).name for _ in range(2)}
    (record,) = caplog.records  # once, though asked twice
    return names.pop(), record.getMessage()


NODES_OF_8 = {"local_world_size": 8}
FAST_HOST, SLOW_HOST = Speeds(host_us=1.0), Speeds(host_us=400.0)


@pytest.mark.parametrize(
    ("world_size", "rows", "nodes", "speeds", "chosen", "reason"),
    [
        (2, 65536, {}, Speeds(), "ring", "one rank per node as far as known"),
        (8, 1024, {}, Speeds(), "all_gather", "one rank per node as far as known"),
        (8, 32768, NODES_OF_8, Speeds(), "ring", "one node"),
        (16, 32768, NODES_OF_8, Speeds(), "two_level", "2 nodes of 8 ranks"),
        (16, 32768, {}, Speeds(), "ring", "one rank per node as far as known"),
        # What was measured decides: a host that keeps up with narrow visits, or does not; links
        # that keep up in one direction, or need both.
        (256, 8192, NODES_OF_8, FAST_HOST, "two_level", "32 nodes of 8 ranks"),
        (256, 8192, NODES_OF_8, SLOW_HOST, "node_gather", "32 nodes of 8 ranks"),
        (64, 8192, {}, Speeds(latency_us=900.0), "two_way", "one rank per node as far as known"),
    ],
)
def test_auto_chooses_from_sizes_nodes_and_speeds(
    world_size, rows, nodes, speeds, chosen, reason, caplog, monkeypatch
):
    monkeypatch.setattr(groups, "known_speeds", lambda _: speeds)
    name, message = _chosen(world_size, rows, 256, caplog, **nodes)
    assert name == chosen, message
    assert message.startswith(f"exchange auto -> {chosen} ({reason}): {world_size} ranks, ")
    assert "predicted " in message


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match=r"max_visits \(0\)"), simulated_world(2, max_visits=0):
        pass
    with (
        pytest.raises(UserError, match=r"local_world_size \(3\) must divide the 4 ranks"),
        simulated_world(4, local_world_size=3),
    ):
        pass
    with (
        simulated_world(2),
        pytest.raises(UserError, match="without a process group"),
        simulated_world(2),
    ):
        pass
