"""Predicted costs: against hand-counted cases and the published comparison of peers."""

from dataclasses import replace

import pytest

from dist_siglip.distributed import speeds
from dist_siglip.distributed.cost_model import Cluster, Problem, predict
from dist_siglip.distributed.handshake import agree
from dist_siglip.distributed.speeds import Speeds, known_speeds, remember
from dist_siglip.errors import UserError

MIB = 2**20


def _predict(exchange, world_size, batch, width, local=8, **problem):
    cluster = Cluster(world_size=world_size, local_world_size=local, host_us=0.0)
    return predict(exchange, cluster, Problem(local_batch_size=batch, embed_dim=width, **problem))


# MiB sent and MiB of memory, worked out by hand from what each method sends and keeps in bf16.
# Memory of the ring: two shards, three float32 accumulators, the float32 image gradient, a tile.
@pytest.mark.parametrize(
    ("world_size", "batch", "width", "exchange", "sent", "memory"),
    [
        (8, 4096, 768, "ring", 138, 12 + 24 + 12 + 12 + 12 + 3),
        (8, 4096, 768, "open_clip bidir", 84, 1072),
        (8, 4096, 768, "open_clip bidir chunked", 84, 560),
        (64, 1024, 768, "ring", 286.5, 3 + 9 + 3 + 12),
        (64, 1024, 768, "open_clip bidir", 189, 608),
        (256, 4096, 768, "ring", 4602, 75),
        (256, 4096, 768, "two_level", 4602, 24 + 60 + 12 + 12),
        (256, 4096, 768, "node_gather", 4602, 18 * 6 + 25 * 12 + 12 + 12),
        (256, 4096, 768, "two_way", 4602, 120),
        (256, 4096, 768, "all_gather", 255 * 18, 256 * 18 + 12 + 12 + 12),
        (256, 4096, 768, "open_clip bidir", 3060, 34304),
        (256, 4096, 768, "open_clip bidir chunked", 3060, 17920),
        (32, 32768, 1024, "ring", 6080, 772),
        (32, 32768, 1024, "open_clip bidir", 3968, 264192),
    ],
)
def test_bytes_and_memory_by_hand(world_size, batch, width, exchange, sent, memory):
    found = _predict(exchange, world_size, batch, width)
    assert (found.sent_bytes / MIB, found.memory_bytes / MIB) == (sent, memory)


def test_two_level_sends_a_local_world_size_less_through_each_card():
    ring, two_level = (_predict(name, 32, 1024, 256) for name in ("ring", "two_level"))
    shard, sums = 1024 * 256 * 2, 1024 * 256 * 4
    assert ring.nic_bytes == 31 * shard + 32 * sums
    # Three crossings of four nodes, and the way home.
    assert two_level.nic_bytes == 3 * shard + 4 * sums
    assert two_level.sent_bytes == ring.sent_bytes
    assert two_level.seconds < ring.seconds / 1.5


def test_two_way_takes_half_the_steps():
    ring, two_way = (_predict(name, 64, 256, 64, local=1) for name in ("ring", "two_way"))
    assert (ring.steps, two_way.steps) == (64, 33)
    assert two_way.sent_bytes == ring.sent_bytes


def test_time_of_two_ranks_by_hand():
    cluster = Cluster(
        world_size=2, local_world_size=2, teraflops=1.0, nvlink_gb_s=1.0, latency_us=100.0
    )
    problem = Problem(local_batch_size=1000, embed_dim=100)
    visit = 6 * 1000**2 * 100 / 1e12
    shard, sums = 100e-6 + 2e5 / 1e9, 100e-6 + 4e5 / 1e9
    # The shard (0.3 ms) hides behind the first visit (0.6 ms), its sums behind the second; the
    # second accumulator goes home with nothing to hide behind.
    found = predict("ring", cluster, problem)
    assert shard < visit
    assert sums < visit
    assert found.compute_seconds == pytest.approx(2 * visit)
    assert found.exposed_seconds == pytest.approx(sums)
    blocking = predict("open_clip bidir", cluster, problem)
    assert blocking.exposed_seconds == pytest.approx(2 * shard)


def test_a_frozen_travelling_side_sends_and_computes_less():
    found = _predict("ring", 16, 512, 64, accumulator_bytes=0)
    assert found.sent_bytes == 15 * 512 * 64 * 2
    assert found.steps == 15
    full = _predict("ring", 16, 512, 64)
    assert found.compute_seconds == pytest.approx(full.compute_seconds * 2 / 3)


@pytest.mark.parametrize("exchange", ["ring", "two_way", "two_level", "node_gather", "all_gather"])
def test_one_rank_sends_nothing(exchange):
    found = _predict(exchange, 1, 512, 64, local=1)
    assert (found.sent_bytes, found.nic_bytes, found.steps) == (0, 0, 0)
    assert found.exposed_seconds == pytest.approx(0)


def test_speeds_are_kept_and_read(tmp_path, monkeypatch):
    """What was measured replaces guesses, kind by kind of device; a broken file is as none."""
    monkeypatch.setattr(speeds, "user_cache_folder", lambda name: str(tmp_path / name))
    guesses = known_speeds("cuda")
    assert guesses == Speeds()
    assert remember("cuda", host_us=321.0) == tmp_path / "speeds" / "cuda.json"
    remember("cuda", nic_gb_s=12.5, latency_us=20.0)
    assert known_speeds("cuda") == replace(guesses, host_us=321.0, nic_gb_s=12.5, latency_us=20.0)
    assert known_speeds("cpu").host_us != 321.0
    with pytest.raises(UserError, match=r"nic_gb_s \(nan\) must be above 0"):
        remember("cuda", nic_gb_s=float("nan"))
    for text in ("[1]", "{", '{"host_us": "fast"}', '{"host_us": -1}'):
        (tmp_path / "speeds" / "cuda.json").write_text(text)
        assert known_speeds("cuda") == guesses
    remember("cuda", teraflops=500.0)
    assert known_speeds("cuda") == replace(guesses, teraflops=500.0)


def test_all_ranks_reckon_with_the_speeds_of_the_first():
    messages = []
    for known in (Speeds(host_us=1.0), Speeds(host_us=2.0)):
        agree(3, 1, "", lambda said: messages.append(said) or [said], speeds=known)
    assert agree(3, 1, "", lambda _: messages).speeds == Speeds(host_us=1.0)


def test_a_slow_host_waits_less_for_wide_visits():
    """64 ranks on 8 nodes: 64 visits, or 3 and 7 more of whole nodes."""
    problem = Problem(local_batch_size=256, embed_dim=64)
    cluster = Cluster(world_size=64, local_world_size=8, latency_us=0.0, host_us=1000.0)
    narrow, wide = (predict(name, cluster, problem) for name in ("two_level", "node_gather"))
    assert narrow.seconds == pytest.approx(64e-3, rel=0.01)
    assert wide.seconds == pytest.approx(10e-3, rel=0.01)
    assert wide.sent_bytes == narrow.sent_bytes


def test_wrong_values_are_named():
    with pytest.raises(UserError, match=r"local_world_size \(8\) must divide world_size \(12\)"):
        Cluster(world_size=12)
    with pytest.raises(UserError, match=r"nic_gb_s \(0\) must be above 0"):
        Cluster(world_size=8, nic_gb_s=0)
    with pytest.raises(UserError, match=r"embed_dim \(0\)"):
        Problem(local_batch_size=1, embed_dim=0)
    with pytest.raises(UserError, match=r"exchange \('rings'\) must be one of ring, two_way"):
        _predict("rings", 8, 1, 1)
