"""``bench plan`` and ``bench simulate`` print what they predict and measure."""

import json

import pytest
import torch

from dist_siglip.bench.plan import plan
from dist_siglip.bench.simulate import measure_host_us, simulate, simulate_step
from dist_siglip.distributed.cost_model import Cluster, Problem
from dist_siglip.errors import UserError


def test_the_plan_as_json(capsys):
    assert plan(world_size=256, local_batch_size=4096, embed_dim=768, json=True) == 0
    rows = {row["exchange"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["ring"]["memory_bytes"] == 75 * 2**20
    assert rows["open_clip bidir"]["memory_bytes"] == 34304 * 2**20
    assert rows["ring"]["gain"] == 1.0
    assert rows["two_level"]["gain"] > 1.5
    assert rows["two_level"]["nic_bytes"] * 8 < rows["ring"]["nic_bytes"] * 1.01


def test_agreeing_of_4096_ranks_is_counted(capsys):
    """Twelve messages of 64 bytes a step, with some 24 neighbours; what is left is linear once."""
    assert plan(world_size=4096, json=True) == 0
    control = json.loads(capsys.readouterr().out)[-1]
    assert control["exchange"] == "control plane"
    assert (control["steady_messages"], control["steady_bytes"]) == (12, 12 * 64)
    assert control["first_bytes"] == 12 * 64 + 4095 * 512
    assert control["group_connections"] == 23
    assert control["requests_to_name_a_missing_rank"] <= 2 * 12 + 4
    assert control["metadata_calls_of_a_node"] == 30_000
    with pytest.raises(UserError, match=r"num_shards \(0\) must be at least 1"):
        plan(num_shards=0)


def test_the_plan_as_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert plan(world_size=16) == 0
    printed = capsys.readouterr().out
    for word in (
        "two_level",
        "node_gather",
        "open_clip gather",
        "gain",
        "2 nodes of 8 GPUs",
        "75 MiB",
    ):
        assert word in printed


# A shape in which features and accumulators weigh as much as the tile, so each part of the
# prediction shows.
@pytest.mark.parametrize("exchange", ["ring", "two_way", "two_level", "node_gather", "all_gather"])
@pytest.mark.parametrize("feature_bytes", [2, 4])
@pytest.mark.parametrize("world_size", [8, 64, 256])
def test_measured_memory_is_what_the_plan_says(exchange, feature_bytes, world_size):
    problem = Problem(
        local_batch_size=256, embed_dim=64, feature_bytes=feature_bytes, chunk_rows=64
    )
    cluster = Cluster(world_size=world_size)
    visits = 1 if exchange == "all_gather" else 2  # whose second one is of nearly all shards
    found = simulate_step(cluster, problem, exchange, visits, torch.device("cpu"))
    assert found.visits == visits
    assert found.peak_bytes == pytest.approx(found.predicted_bytes, rel=0.10)


def test_the_host_is_timed_where_nothing_else_takes_time():
    assert 1 < measure_host_us(torch.device("cpu"), num_visits=8) < 1e6


def test_simulated_worlds_as_json_and_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    settings = {"local_batch_size": 64, "embed_dim": 32, "chunk_rows": 32, "device": "cpu"}
    assert simulate(world_sizes=(64, 256), json=True, **settings) == 0
    small, large = json.loads(capsys.readouterr().out)
    assert (small["world_size"], large["world_size"]) == (64, 256)
    assert large["peak_bytes"] == pytest.approx(small["peak_bytes"], rel=0.05)
    assert simulate(world_sizes=(8,), visits=None, **settings) == 0
    assert "open_clip predicted" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"visits \(0\) must be at least 1"):
        simulate(world_sizes=(8,), visits=0, **settings)
