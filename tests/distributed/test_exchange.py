"""Every exchange brings every shard past every rank once, and the sums come home."""

from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_siglip.distributed import (
    AccumulatorSpec,
    circulate,
    copy_from_first_rank,
    gather_rows,
    max_over_ranks,
    prepare_exchange,
    set_local_world_size,
    sum_over_ranks,
)
from dist_siglip.distributed.p2p import P2PChannel
from dist_siglip.errors import UserError
from dist_siglip.losses import siglip_loss
from tests.support.processes import run_ranks
from tests.support.reference import sigmoid_loss_and_gradients

# Exchange and ranks per node (None: as the launcher says, here one).
EXCHANGES = [
    ("ring", None),
    ("two_way", None),
    ("two_level", None),
    ("node_gather", None),
    ("all_gather", None),
    ("auto", None),
]
THROUGH_NODES = ("two_level", "node_gather")
NODES = {
    size: [(name, local) for name in THROUGH_NODES for local in locals_]
    for size, locals_ in {2: [2], 3: [3], 4: [2, 4]}.items()
}
LAYOUTS = {  # rows by rank
    1: [(3,)],
    2: [(3, 5), (4, 4)],
    3: [(4, 0, 2), (3, 3, 3)],
    4: [(1, 2, 3, 4), (2, 2, 2, 2), (0, 0, 3, 0)],
}
LOSS_LAYOUTS = [(2, 2, 2, 2), (1, 4, 2, 3)]
COMBINES = ("sum", "max", "logaddexp")


def _shard(rank, rows):
    values = torch.arange(rows * 2, dtype=torch.float64).reshape(rows, 2) + 100 * rank
    return values, torch.full((rows,), rank, dtype=torch.int64)


def _travel(rank, layout, exchange, combine, local_world_size=None):
    """Each rank adds (its rank + 1) * shard value / 100; the visits are recorded."""
    features, owners = _shard(rank, layout[rank])
    visits = []

    def visit(owner, shard, contributions):
        # Gathered shards come as one, of consecutive ranks.
        last = owner + 1
        while sum(layout[owner:last]) < len(shard[0]):
            last += 1
        here = [_shard(other, layout[other]) for other in range(owner, last)]
        for found, expected in zip(shard, zip(*here, strict=True), strict=True):
            assert torch.equal(found, torch.cat(expected))
        visits.append((owner, len(shard[0])))
        contributions[0].copy_(shard[0] * (rank + 1) / 100)
        contributions[1].copy_(10 * rank + shard[1])

    whole = torch.float64 if combine == "logaddexp" else torch.int64
    specs = [AccumulatorSpec((2,), torch.float64), AccumulatorSpec((), whole)]
    home = circulate(
        [features, owners],
        visit,
        accumulators=specs,
        combine=combine,
        exchange=exchange,
        local_world_size=local_world_size,
    )
    return visits, home


def _cases(world_size):
    return [
        (layout, exchange, combine, local)
        for layout in LAYOUTS[world_size]
        for exchange, local in EXCHANGES + NODES[world_size]
        for combine in COMBINES
    ]


def _everything(rank, world_size):
    """One spawn per world size computes everything; the tests read it."""
    results = {
        (layout, exchange, combine, local): _travel(rank, layout, exchange, combine, local)
        for layout, exchange, combine, local in _cases(world_size)
    }
    with pytest.MonkeyPatch.context() as patch:  # the path of NCCL, over gloo
        patch.setattr(P2PChannel, "_launches_batches", lambda *_: True)
        results["as one"] = {
            name: _travel(rank, LAYOUTS[world_size][0], name, "sum") for name in ("ring", "two_way")
        }
    if world_size == 3:
        results["mismatches"] = _mismatches(rank)
        results["subgroup"] = _in_a_subgroup(rank)
        results["collectives"] = _collect(rank)
    if world_size == 4:
        results["loss"] = {
            (sizes, name): _loss_on_two_nodes(rank, sizes, name)
            for sizes in LOSS_LAYOUTS
            for name in THROUGH_NODES
        }
    return results


def _pairs(num_pairs):
    generator = torch.Generator().manual_seed(num_pairs)
    return F.normalize(torch.randn(2, num_pairs, 5, generator=generator).double(), dim=-1)


def _loss_on_two_nodes(rank, sizes, exchange):
    """Loss and DDP-mean gradients over two nodes of two ranks, which only the program knows."""
    set_local_world_size(2)
    start = sum(sizes[:rank])
    images, texts = _pairs(sum(sizes))[:, start : start + sizes[rank]].clone()
    leaves = [images, texts, torch.tensor(7.0).double(), torch.tensor(-3.0).double()]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = siglip_loss(*leaves, exchange=exchange, chunk_rows=2)
    loss.backward()
    return {
        "loss": sum_over_ranks(loss) / 4,
        "image": gather_rows(images.grad) / 4,
        "text": gather_rows(texts.grad) / 4,
        "scale": sum_over_ranks(leaves[2].grad) / 4,
        "bias": sum_over_ranks(leaves[3].grad) / 4,
    }


@lru_cache
def results_of(world_size):
    return run_ranks(_everything, world_size)


@pytest.mark.parametrize("exchange", THROUGH_NODES)
@pytest.mark.parametrize("sizes", LOSS_LAYOUTS)
def test_a_loss_over_two_nodes_of_two_ranks_is_that_of_one_process(sizes, exchange):
    truth = sigmoid_loss_and_gradients(*_pairs(sum(sizes)), 7.0, -3.0)
    for results in results_of(4):
        for name, found in results["loss"][sizes, exchange].items():
            assert torch.allclose(found, truth[name].reshape(found.shape), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_shard_is_visited_once_and_accumulators_come_home(world_size):
    for rank, results in enumerate(results_of(world_size)):
        for case in _cases(world_size):
            (layout, _, combine, _), (visits, (floats, wholes)) = case, results[case]
            assert sum(rows for _, rows in visits) == sum(layout), case
            assert visits[0] == (rank, layout[rank])
            features, _ = _shard(rank, layout[rank])
            others = torch.arange(world_size, dtype=torch.float64)
            everyones = (others[:, None, None] + 1) * features / 100
            numbers = 10 * others + rank
            if combine == "logaddexp":
                expected, number = everyones.logsumexp(0), numbers.logsumexp(0)
            elif combine == "sum":
                expected, number = everyones.sum(0), numbers.sum(0)
            else:
                expected, number = everyones.amax(0), numbers.amax(0)
            assert torch.allclose(floats, expected, rtol=1e-14, atol=0), case
            assert torch.allclose(wholes.double(), number.expand(len(features)), rtol=1e-14), case


@pytest.mark.parametrize("world_size", [2, 3])
def test_transfers_of_a_batch_may_be_launched_as_one(world_size):
    for results in results_of(world_size):
        for name, (visits, home) in results["as one"].items():
            expected_visits, expected = results[LAYOUTS[world_size][0], name, "sum", None]
            assert visits == expected_visits
            assert all(torch.equal(*pair) for pair in zip(home, expected, strict=True))


@pytest.mark.parametrize(("exchange", "local"), [*EXCHANGES, ("local", None)])
def test_one_rank_without_a_process_group(exchange, local):
    visits, (floats, wholes) = _travel(0, (3,), exchange, "sum", local)
    assert visits == [(0, 3)]
    assert torch.equal(floats, _shard(0, 3)[0] / 100)
    assert torch.equal(wholes, torch.zeros(3, dtype=torch.int64))


def _refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def _mismatches(rank):
    cases = {
        "dtype": [torch.zeros(2, 4, dtype=torch.float64 if rank == 1 else torch.float32)],
        "width": [torch.zeros(2, 5 if rank == 1 else 4)],
        "tensors": [torch.zeros(2, 4)] * (2 if rank == 1 else 1),
    }
    messages = {
        name: _refusal(lambda columns=columns: prepare_exchange(columns))
        for name, columns in cases.items()
    }
    rows = [torch.zeros(2, 4)]
    specs = [AccumulatorSpec((4,), torch.float32)] * (rank != 1)
    messages["accumulators"] = _refusal(lambda: prepare_exchange(rows, accumulators=specs))
    messages["exchange"] = _refusal(
        lambda: prepare_exchange(rows, exchange="two_way" if rank == 1 else "ring")
    )
    messages["purpose"] = _refusal(lambda: prepare_exchange(rows, purpose=f"{rank == 1}"))
    messages["local"] = _refusal(lambda: prepare_exchange(rows, exchange="local"))
    return messages


def test_a_mismatch_names_the_odd_rank_on_every_rank():
    for results in results_of(3):
        messages = results["mismatches"]
        for name in ("dtype", "width", "tensors", "accumulators", "exchange", "purpose"):
            assert messages[name].startswith("rank 1 passes ["), messages[name]
        assert "float64 (*, 4)" in messages["dtype"]
        assert "(*, 5)" in messages["width"]
        assert "accumulators: none" in messages["accumulators"]
        assert "two_way" in messages["exchange"]
        assert "the group has 3" in messages["local"]


def _in_a_subgroup(rank):
    """Ranks 1 and 2 of three form a group; global rank 1 is its rank 0."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    values = torch.full((1,), float(rank))

    def visit(owner, shard, contributions):
        assert shard[0].tolist() == [owner + 1 + more for more in range(len(shard[0]))]
        contributions[0].copy_(shard[0] * rank)

    spec = [AccumulatorSpec((), torch.float32)]
    return [
        circulate([values], visit, accumulators=spec, exchange=exchange, group=group)[0].item()
        for exchange, _ in EXCHANGES
    ]


def test_ranks_count_inside_the_group():
    found = [results["subgroup"] for results in results_of(3)]
    assert found == [None, [3.0] * len(EXCHANGES), [6.0] * len(EXCHANGES)]


def _collect(rank):
    shared = [torch.full((2,), float(rank)), torch.tensor(rank)]
    copy_from_first_rank(shared)
    assert [tensor.sum().item() for tensor in shared] == [0, 0]
    rows = torch.full((rank, 2), rank, dtype=torch.int64)
    return (
        gather_rows(rows),
        gather_rows(torch.tensor([rank == 1])),
        gather_rows(torch.zeros(0, 3)),
        sum_over_ranks(torch.tensor([1.0, rank])),
        max_over_ranks(torch.tensor([-1.0, rank])),
    )


def test_plain_collectives_agree_on_every_rank():
    for results in results_of(3):
        rows, flags, nothing, total, largest = results["collectives"]
        assert rows.tolist() == [[1, 1], [2, 2], [2, 2]]
        assert flags.tolist() == [False, True, False]
        assert nothing.shape == (0, 3)
        assert total.tolist() == [3.0, 3.0]
        assert largest.tolist() == [-1.0, 2.0]


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match=r"exchange \('rings'\) must be one of auto, local"):
        circulate([torch.zeros(1, 1)], lambda *_: None, exchange="rings")
    with pytest.raises(UserError, match=r"same number of rows; got \[1, 2\]"):
        circulate([torch.zeros(1, 1), torch.zeros(2)], lambda *_: None)
    with pytest.raises(UserError, match="at least one tensor"):
        circulate([], lambda *_: None)
