"""Every exchange brings every shard past every rank once, and the sums come home."""

import pytest
import torch
import torch.distributed as dist

from dist_siglip.distributed import (
    AccumulatorSpec,
    circulate,
    copy_from_first_rank,
    gather_rows,
    max_over_ranks,
    prepare_exchange,
    sum_over_ranks,
)
from dist_siglip.errors import UserError
from tests.support.processes import run_ranks

EXCHANGES = ("ring", "all_gather", "auto")
ROWS = {1: (3,), 2: (3, 5), 3: (4, 0, 2), 4: (1, 2, 3, 4)}


def _shard(rank, rows):
    values = torch.arange(rows * 2, dtype=torch.float64).reshape(rows, 2) + 100 * rank
    return values, torch.full((rows,), rank, dtype=torch.int64)


def _travel(rank, world_size, exchange, combine):
    """Each rank adds (its rank + 1) * shard value; the visits are recorded."""
    features, owners = _shard(rank, ROWS[world_size][rank])
    visits = []

    def visit(owner, shard, contributions):
        assert (shard[1] == owner).all()
        assert torch.equal(shard[0], _shard(owner, ROWS[world_size][owner])[0])
        visits.append(owner)
        contributions[0].copy_(shard[0] * (rank + 1))
        contributions[1].fill_(10 * rank + owner)

    specs = [AccumulatorSpec((2,), torch.float64), AccumulatorSpec((), torch.int64)]
    home = circulate(
        [features, owners], visit, accumulators=specs, combine=combine, exchange=exchange
    )
    return visits, home


def _travel_all_ways(rank, world_size):
    return {(e, c): _travel(rank, world_size, e, c) for e in EXCHANGES for c in ("sum", "max")}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_shard_is_visited_once_and_accumulators_come_home(world_size):
    for rank, results in enumerate(run_ranks(_travel_all_ways, world_size)):
        features, _ = _shard(rank, ROWS[world_size][rank])
        for (exchange, combine), (visits, (floats, integers)) in results.items():
            assert sorted(visits) == list(range(world_size)), exchange
            assert visits[0] == rank
            factors = range(1, world_size + 1)
            factor = sum(factors) if combine == "sum" else max(factors)
            numbers = [10 * other + rank for other in range(world_size)]
            number = sum(numbers) if combine == "sum" else max(numbers)
            assert torch.equal(floats, features * factor), (exchange, combine)
            assert torch.equal(integers, torch.full((len(features),), number))


def test_one_rank_without_a_process_group():
    visits, (floats, integers) = _travel(0, 1, "auto", "sum")
    assert visits == [0]
    assert torch.equal(floats, _shard(0, 3)[0])
    assert torch.equal(integers, torch.zeros(3, dtype=torch.int64))


def _mismatches(rank, world_size):
    messages = {}
    cases = {
        "dtype": [torch.zeros(2, 4, dtype=torch.float64 if rank == 1 else torch.float32)],
        "width": [torch.zeros(2, 5 if rank == 1 else 4)],
        "tensors": [torch.zeros(2, 4)] * (2 if rank == 1 else 1),
    }
    for name, columns in cases.items():
        with pytest.raises(UserError) as caught:
            prepare_exchange(columns)
        messages[name] = str(caught.value)
    specs = [AccumulatorSpec((4,), torch.float32)] * (rank != 1)
    with pytest.raises(UserError) as caught:
        prepare_exchange([torch.zeros(2, 4)], accumulators=specs)
    messages["accumulators"] = str(caught.value)
    with pytest.raises(UserError) as caught:
        prepare_exchange([torch.zeros(2, 4)], exchange="local")
    messages["local"] = str(caught.value)
    return messages


@pytest.mark.distributed
def test_a_mismatch_names_the_odd_rank_on_every_rank():
    for messages in run_ranks(_mismatches, 3):
        for name in ("dtype", "width", "tensors", "accumulators"):
            assert messages[name].startswith("rank 1 passes ["), messages[name]
        assert "float64 (*, 4)" in messages["dtype"]
        assert "(*, 5)" in messages["width"]
        assert "accumulators: none" in messages["accumulators"]
        assert "the group has 3" in messages["local"]


def _in_a_subgroup(rank, world_size):
    """Ranks 1 and 2 of three form a group; global rank 1 is its rank 0."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    values = torch.full((1,), float(rank))

    def visit(owner, shard, contributions):
        assert shard[0].item() == owner + 1
        contributions[0].copy_(shard[0] * rank)

    spec = [AccumulatorSpec((), torch.float32)]
    return [
        circulate([values], visit, accumulators=spec, exchange=e, group=group)[0].item()
        for e in EXCHANGES
    ]


@pytest.mark.distributed
def test_ranks_count_inside_the_group():
    assert run_ranks(_in_a_subgroup, 3) == [None, [3.0] * 3, [6.0] * 3]


def _collect(rank, world_size):
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


@pytest.mark.distributed
def test_plain_collectives_agree_on_every_rank():
    for rows, flags, nothing, total, largest in run_ranks(_collect, 3):
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
