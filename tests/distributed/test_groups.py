"""Companions of a group: which backend, who joins, and when; no device is needed."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_siglip.distributed import connect_ranks, exchange_group, gather_rows, groups
from dist_siglip.distributed.combine import all_gather_single
from dist_siglip.errors import UserError
from dist_siglip.losses import siglip_loss, softmax_loss
from tests.support.processes import run_ranks

GPU = torch.device("cuda", 0)
CONFIGS = {
    "nccl": "nccl",
    "cpu:gloo,cuda:nccl": "nccl",
    "cuda:nccl2,cpu:gloo": "nccl2",
    "cuda:xccl": "xccl",
}


@pytest.fixture
def made(monkeypatch):
    """A world of four without devices; what is asked of torch is noted."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    calls = []

    def new_group(ranks=None, **settings):
        # By keyword and in this order, as ``torch.distributed.new_group`` has them.
        calls.append({"ranks": ranks, **settings})
        return new(ranks, backend="fake", timeout=settings["timeout"]) if 1 in ranks else object()

    new = dist.new_group
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(groups, "_warm_up", lambda group, device: calls.append({"warm": device}))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append({"wait": device}))
    yield calls
    dist.destroy_process_group()


def _use(monkeypatch, config):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)


@pytest.mark.parametrize("config", CONFIGS)
def test_transfers_have_the_backend_of_the_features_device(made, monkeypatch, config):
    _use(monkeypatch, config)
    connect_ranks(GPU)
    wait, control, transfer, warm = made
    assert wait == {"wait": GPU}  # nothing may be under way where a communicator is split
    assert control["backend"] == "gloo"
    assert transfer["backend"] == CONFIGS[config]
    assert transfer["ranks"] == [0, 1, 2, 3]
    assert warm == {"warm": GPU}
    options = transfer["pg_options"]
    if CONFIGS[config].startswith("nccl"):
        assert options.is_high_priority_stream
    else:
        assert options is None


def test_several_nodes_get_a_communicator_for_what_crosses(made, monkeypatch):
    _use(monkeypatch, "nccl")
    connect_ranks(GPU, across_nodes=True)
    assert [call["backend"] for call in made if "backend" in call] == ["gloo", "nccl", "nccl"]
    transfers = groups.transfers_of(dist.group.WORLD, GPU)
    assert transfers.crossing.group is not transfers.channel.group
    connect_ranks(GPU)
    assert len([call for call in made if "backend" in call]) == 3  # made once


def test_features_on_a_cpu_need_no_communicator(made, monkeypatch):
    _use(monkeypatch, "cpu:gloo,cuda:nccl")
    connect_ranks(torch.device("cpu"))
    assert [call["backend"] for call in made] == ["gloo"]


def test_a_kind_of_device_without_a_backend_is_named(made, monkeypatch):
    _use(monkeypatch, "cpu:gloo")
    with pytest.raises(UserError, match=r"process group \(cpu:gloo\) has no backend .* on cuda"):
        connect_ranks(GPU)


@pytest.mark.parametrize("is_bound", [False, True])
@pytest.mark.parametrize("ranks", [[1, 2], [2, 3]])
def test_all_ranks_make_a_group_where_torch_splits_the_default_one(
    made, monkeypatch, is_bound, ranks
):
    """This is rank 1: a member of one group only."""
    _use(monkeypatch, "nccl")
    monkeypatch.setattr(groups, "_bound_device", lambda: GPU if is_bound else None)
    group = exchange_group(ranks)
    assert (group is None) == (1 not in ranks)
    on_device = [call for call in made if "ranks" in call and call.get("backend") != "gloo"]
    # The group and, where it is split off, its communicator: nobody may stay away from either.
    assert [call["ranks"] for call in on_device] == [ranks] * (2 if is_bound else 1)
    assert {call["use_local_synchronization"] for call in on_device} == {not is_bound}
    # The one on the CPU is no split: only its members make it.
    on_cpu = [call for call in made if call.get("backend") == "gloo"]
    assert [call["use_local_synchronization"] for call in on_cpu] == [True] * (1 in ranks)


def test_a_part_of_a_split_world_without_companions_is_refused(made, monkeypatch):
    _use(monkeypatch, "nccl")
    part = dist.new_group([0, 1], timeout=timedelta(seconds=9))
    monkeypatch.setattr(groups, "_bound_device", lambda: GPU)
    with pytest.raises(UserError, match=r"ranks \[0, 1\] has no way .*exchange_group, which every"):
        groups.transfers_of(part, GPU)


def _sockets():
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.startswith("socket:") for link in links)


def _connect_then_exchange(rank, world_size):
    """Count groups that are made, before and after; and connections of one made on demand."""
    made, new_group = [], dist.new_group
    dist.new_group = lambda *args, **settings: made.append(1) or new_group(*args, **settings)
    connect_ranks(torch.device("cpu"))
    before = len(made)
    rows = torch.eye(3, 4, requires_grad=True)
    for exchange in ("ring", "all_gather"):
        siglip_loss(rows, rows, torch.tensor(5.0), torch.tensor(-5.0), exchange=exchange).backward()
        softmax_loss(rows, rows, torch.tensor(5.0), exchange=exchange)
    gather_rows(rows)
    after = len(made)
    here, counts = [], []
    for connects_on_demand in (False, True):
        opened = _sockets()
        group = groups._new_cpu_group(dist.group.WORLD, connects_on_demand=connects_on_demand)
        all_gather_single(torch.empty(world_size), torch.ones(1), group=group)
        here.append(group)
        counts.append(_sockets() - opened)
    return before, after, counts, os.environ.get("TORCH_GLOO_LAZY_INIT")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="sockets are counted in /proc")
def test_no_group_is_made_after_the_ranks_are_connected():
    for before, after, (all_at_once, on_demand), variable in run_ranks(_connect_then_exchange, 4):
        assert before == after == 1
        # Each with its two neighbours, and not with all three others.
        assert on_demand < all_at_once
        assert variable is None
