"""Exchanges over nodes: every pair meets once and sums come home, in worlds of any shape.

Ranks are threads here, and a transfer is a copy from one to another, by ranks, tag and order.
"""

import queue
import threading
from collections import defaultdict

import pytest
import torch

from dist_siglip.distributed import AccumulatorSpec, circulate, simulate
from dist_siglip.distributed.combine import COMBINE_IN_PLACE
from dist_siglip.distributed.node_ring import Place, run_node_gather, run_two_level
from dist_siglip.distributed.p2p import PendingBatch
from dist_siglip.distributed.simulate import simulated_world

RUNS = {"two_level": run_two_level, "node_gather": run_node_gather}
SHAPES = [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (2, 2), (2, 3), (3, 2), (4, 2), (3, 4), (5, 3)]
WAIT_SECONDS = 60


class Network:
    """Messages under way, first in, first out, between two ranks with one tag."""

    def __init__(self):
        self.queues = defaultdict(queue.Queue)


class Channel:
    """One rank's end. What is sent is read when it is waited for: buffers must be left alone."""

    def __init__(self, network, rank):
        self.network, self.rank = network, rank

    def post(self, outgoing, arriving):
        batch = PendingBatch((), tuple(outgoing), tuple(arriving))
        for message in batch.outgoing:
            assert message.peer != self.rank, "a rank sends to itself"
            tensors = [tensor.clone() for tensor in message.tensors]
            key = (self.rank, message.peer, message.tag)
            self.network.queues[key].put((tensors, message.what, message.owner))
        for message in batch.arriving:
            for tensor in message.tensors:
                tensor.fill_(-(10**6))  # not there before it is waited for
        return batch

    def wait(self, batch):
        for message in batch.arriving:
            key = (message.peer, self.rank, message.tag)
            tensors, *content = self.network.queues[key].get(timeout=WAIT_SECONDS)
            assert content == [message.what, message.owner]
            for mine, theirs in zip(message.tensors, tensors, strict=True):
                mine.copy_(theirs)


def run_world(run, num_nodes, size, row_counts, combine="sum"):
    """Let rank r add (r + 1) * 1000 ** k to accumulator k of every row; return visits and sums."""
    world_size = num_nodes * size
    network = Network()
    results = [None] * world_size

    def be_rank(rank):
        rows = torch.arange(row_counts[rank], dtype=torch.float64)[:, None] + 100.0 * rank
        owner_column = torch.full((row_counts[rank],), rank)
        seen, calls = [], []

        def visit(owner, shard, contributions):
            calls.append((owner, len(shard[0])))
            seen.extend(zip(shard[1].tolist(), shard[0][:, 0].tolist(), strict=True))
            contributions[0].fill_(rank + 1.0)
            contributions[1].copy_(shard[0] * (rank + 1.0))

        home = run(
            (rows, owner_column),
            visit,
            [AccumulatorSpec((), torch.float64), AccumulatorSpec((1,), torch.float64)],
            COMBINE_IN_PLACE[combine],
            row_counts,
            Place(rank, num_nodes, size),
            Channel(network, rank),
            Channel(network, rank),
        )
        results[rank] = calls, seen, home, rows

    threads = [threading.Thread(target=be_rank, args=(r,), daemon=True) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert all(waiting.empty() for waiting in network.queues.values())
    return results


def check(results, row_counts):
    world_size = len(row_counts)
    everyone = [
        (rank, 100.0 * rank + row) for rank in range(world_size) for row in range(row_counts[rank])
    ]
    total = world_size * (world_size + 1) / 2
    for rank, (calls, seen, (counts, sums), rows) in enumerate(results):
        assert calls[0] == (rank, row_counts[rank])
        assert sorted(seen) == everyone
        assert counts.tolist() == [total] * row_counts[rank]
        assert torch.equal(sums, rows * total)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("num_nodes", "size"), SHAPES)
def test_each_pair_meets_once_and_sums_come_home(name, num_nodes, size):
    world_size = num_nodes * size
    for row_counts in ([3] * world_size, [(5 * rank) % 4 for rank in range(world_size)]):
        check(run_world(RUNS[name], num_nodes, size, row_counts), row_counts)


def test_no_rows_at_all():
    results = run_world(run_node_gather, 2, 2, [0] * 4)
    assert [home[0].numel() for _, _, home, _ in results] == [0] * 4


@pytest.mark.parametrize("name", RUNS)
def test_other_combinations(name):
    for combine, expected in (("max", 6.0), ("logaddexp", 6.4561933)):
        for _, _, (counts, _), _ in run_world(RUNS[name], 3, 2, [1] * 6, combine):
            assert counts.item() == pytest.approx(expected)


@pytest.mark.parametrize(("name", "num_calls"), [("two_level", 12), ("node_gather", 5)])
def test_node_gather_visits_the_shards_of_a_node_as_one(name, num_calls):
    """Own, before, after; then one visit for each of the two other nodes."""
    calls, *_ = run_world(RUNS[name], 3, 4, [2] * 12)[5]
    assert len(calls) == num_calls
    if name == "node_gather":
        assert calls == [(5, 2), (4, 2), (6, 4), (0, 8), (8, 8)]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("broken", ["place", "sums"])
def test_a_broken_exchange_is_found(name, broken, monkeypatch):
    """One rank looks for its shards a node too far; or what arrives is not added."""
    right = Place.owner
    if broken == "place":
        monkeypatch.setattr(
            Place,
            "owner",
            lambda self, stage, *local: right(self, stage + (self.rank == 0 < stage), *local),
        )
    else:
        monkeypatch.setitem(COMBINE_IN_PLACE, "sum", lambda mine, theirs: None)
    monkeypatch.setattr(f"{__name__}.WAIT_SECONDS", 1)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises((AssertionError, TypeError)):
        check(run_world(RUNS[name], 3, 3, [1, 2] * 4 + [1]), [1, 2] * 4 + [1])


def _order(exchange, monkeypatch, num_nodes=3, size=4):
    """What one rank posts, waits for and visits, in order, between nodes and inside."""
    order = []

    class Noted(simulate._LoopbackChannel):
        def post(self, outgoing, arriving):
            batch = super().post(outgoing, arriving)
            crosses = [m for m in batch.outgoing if m.peer // size != 1]
            order.extend(f"send {m.what.split()[0]}" for m in crosses[:1])
            return batch

        def wait(self, batch):
            super().wait(batch)
            crosses = [m for m in batch.arriving if m.peer // size != 1]
            order.extend(f"have {m.what.split()[0]}" for m in crosses[:1])

    monkeypatch.setattr(simulate, "_LoopbackChannel", Noted)
    rank = size + 1
    with simulated_world(num_nodes * size, rank=rank, local_world_size=size):
        circulate(
            [torch.ones(2, 3)],
            lambda owner, shard, contributions: (
                order.append("visit"),
                contributions[0].copy_(shard[0]),
            ),
            accumulators=[AccumulatorSpec((3,), torch.float32)],
            exchange=exchange,
        )
    return order


def test_what_crosses_has_the_time_of_a_whole_stage(monkeypatch):
    """Posted before the first visit of a node's shards, waited for after the last one."""
    sums = ["have accumulators", "send accumulators"]
    ring = ["visit"] * 4
    assert _order("two_level", monkeypatch) == [
        *["send shard", *ring, "send accumulators", "have shard"],
        # Sums of the first stage arrive during the second, when its own are there.
        *["send shard", *ring, *sums, "have shard"],
        *[*ring, *sums],
        "have accumulators",  # home
    ]
    assert _order("node_gather", monkeypatch) == [
        *["send shard", "visit", "have shard"],  # beside the own shard
        *["send shard", "visit", "visit", "have shard"],
        *["visit", "send accumulators"],
        *["visit", *sums],
        *[*sums, "have accumulators"],
    ]
