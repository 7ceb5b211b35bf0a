import itertools
from dataclasses import replace

import pytest

from dist_siglip.data.order.position import (
    BatchPlan,
    EvaluationBatchSampler,
    GlobalBatchSampler,
    Progress,
    check_divisible,
)
from dist_siglip.data.order.sequence import epoch_order
from dist_siglip.errors import UserError
from tests.support.shards import UNEVEN

PLAN = BatchPlan(
    counts=UNEVEN, fingerprint="abc", seed=3, global_batch_size=8, block_shards=2
)  # 37 samples: 4 batches an epoch, 5 samples left out


def global_batches(plan, world_size, samples_consumed, num_batches):
    """The batches all ranks see together, each rank's slices joined in rank order."""
    ranks = [
        GlobalBatchSampler(
            plan, rank=rank, world_size=world_size, progress=Progress(samples_consumed)
        )
        for rank in range(world_size)
    ]
    parts = zip(*(itertools.islice(rank, num_batches) for rank in ranks), strict=True)
    return [[slot for part in batch for slot in part] for batch in parts]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("block_shards", [1, 3, 10])
@pytest.mark.parametrize("global_batch_size", [8, 16, 32])
def test_ranks_share_each_batch_of_the_order(world_size, block_shards, global_batch_size):
    plan = replace(PLAN, block_shards=block_shards, global_batch_size=global_batch_size)
    batches = global_batches(plan, world_size, 0, 3 * plan.batches_per_epoch)
    for number, batch in enumerate(batches):
        epoch, place = divmod(number, plan.batches_per_epoch)
        order = epoch_order(3, epoch, UNEVEN, block_shards).tolist()
        first = place * global_batch_size
        assert [slot.sample_id for slot in batch] == order[first : first + global_batch_size]
        assert [slot.position for slot in batch] == [*range(first, first + global_batch_size)]
        assert {slot.epoch for slot in batch} == {epoch}
        assert not any(slot.is_padding for slot in batch)


def test_ranks_have_equally_many_rows():
    sampler = GlobalBatchSampler(PLAN, rank=3, world_size=4, progress=Progress())
    assert [len(batch) for batch in itertools.islice(sampler, 9)] == [2] * 9


def test_epoch_leaves_out_only_its_tail():
    batches = global_batches(PLAN, 2, 0, 8)
    epochs = [batches[:4], batches[4:]]
    seen = [{slot.sample_id for batch in epoch for slot in batch} for epoch in epochs]
    assert [len(ids) for ids in seen] == [32, 32]
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    "stops",
    [
        ((1, 3), (2, 3), (1, 1), (4, 6)),  # world sizes 1 -> 2 -> 1 -> 4, over two epoch ends
        ((8, 2), (1, 1), (8, 1), (2, 9)),  # three times inside one epoch
        ((4, 4), (1, 4), (2, 5)),  # exactly at epoch ends
    ],
)
def test_resumed_runs_see_what_one_run_sees(stops):
    expected = global_batches(PLAN, 1, 0, sum(steps for _, steps in stops))
    seen = []
    for world_size, steps in stops:
        seen += global_batches(PLAN, world_size, len(seen) * 8, steps)
    assert seen == expected


def test_each_iteration_starts_where_progress_stands():
    progress = Progress()
    sampler = GlobalBatchSampler(PLAN, rank=0, world_size=1, progress=progress)
    ahead = [*itertools.islice(sampler, 6)]
    assert progress.samples_consumed == 0  # reading ahead consumes nothing
    progress.samples_consumed = 16
    assert [*itertools.islice(sampler, 4)] == ahead[2:]


def test_indivisible_batch_names_the_neighbours():
    text = r"global_batch_size \(100\) must be divisible by world_size \(8\); use 96 or 104"
    with pytest.raises(UserError, match=text):
        check_divisible(100, 8)
    with pytest.raises(UserError, match=r"\(3\) must be .* \(8\); use 8$"):
        check_divisible(3, 8)
    with pytest.raises(UserError, match="use 6 or 9"):
        GlobalBatchSampler(PLAN, rank=0, world_size=3, progress=Progress())


def test_batch_above_the_data_is_refused():
    with pytest.raises(UserError, match=r"\(38\) must be at most .* \(37\)"):
        replace(PLAN, global_batch_size=38)
    assert replace(PLAN, global_batch_size=37).batches_per_epoch == 1


@pytest.mark.parametrize("num_samples", [1, 2, 5, 16, 17, 37])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("local_batch_size", [1, 2, 5, 64])
def test_evaluation_covers_every_sample_once(num_samples, world_size, local_batch_size):
    ranks = []
    for rank in range(world_size):
        sampler = EvaluationBatchSampler(
            num_samples, rank=rank, world_size=world_size, local_batch_size=local_batch_size
        )
        ranks.append([*sampler])
        assert len(sampler) == len(ranks[-1])
    sizes = [[len(batch) for batch in batches] for batches in ranks]
    assert all(row == sizes[0] for row in sizes)
    assert max(sizes[0]) <= local_batch_size
    slots = [slot for batches in ranks for batch in batches for slot in batch]
    assert [slot.sample_id for slot in slots if not slot.is_padding] == [*range(num_samples)]
    assert len({slot.position for slot in slots}) == len(slots)
    assert all(0 <= slot.sample_id < num_samples for slot in slots)
