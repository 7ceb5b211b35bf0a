import itertools

import numpy as np
import pytest

from dist_siglip.data.order.position import BatchPlan, GlobalBatchSampler, Progress
from dist_siglip.data.order.sequence import Source
from dist_siglip.errors import UserError

MIXTURES = {
    "one": (Source("a", (7, 1, 12, 5), 1.0),),
    "two": (Source("a", (7, 1, 12, 5), 3.0), Source("b", (4, 9), 1.0)),
    "three": (Source("a", (20, 3), 1.0), Source("b", (11,), 1.0), Source("c", (0, 30, 2), 2.0)),
}


def plan_of(sources, global_batch_size=8, block_shards=2):
    return BatchPlan(
        counts=tuple(itertools.chain(*(source.counts for source in sources))),
        fingerprint="abc",
        seed=3,
        global_batch_size=global_batch_size,
        block_shards=block_shards,
        sources=sources,
    )


def batches(plan, world_size, start, count):
    ranks = [
        GlobalBatchSampler(plan, rank=rank, world_size=world_size, progress=Progress(start))
        for rank in range(world_size)
    ]
    parts = zip(*(itertools.islice(rank, count) for rank in ranks), strict=True)
    return [[slot for part in batch for slot in part] for batch in parts]


@pytest.mark.parametrize("sources", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("block_shards", [1, 2, 9])
@pytest.mark.parametrize("global_batch_size", [4, 8])
def test_each_source_goes_through_whole_epochs(sources, block_shards, global_batch_size):
    """Complete and disjoint: epoch e of a source holds each of its samples exactly once."""
    plan = plan_of(sources, global_batch_size, block_shards)
    slots = list(itertools.chain(*batches(plan, 1, 0, 400 // global_batch_size)))
    first = 0
    for number, source in enumerate(sources):
        own = [slot for slot in slots if slot.source == number]
        for epoch in range(own[-1].epoch):
            ids = [slot.sample_id for slot in own if slot.epoch == epoch]
            assert sorted(ids) == [*range(first, first + source.num_samples)]
        assert [slot.position for slot in own] == [
            draw % source.num_samples for draw in range(len(own))
        ]
        first += source.num_samples
    assert len({slot.key(3) for slot in slots}) == len(slots)


@pytest.mark.parametrize("sources", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize(
    "stops", [((1, 3), (2, 3), (1, 1), (4, 16)), ((8, 2), (1, 1), (2, 30)), ((4, 40),)]
)
def test_resumed_mixtures_see_what_one_run_sees(sources, stops):
    plan = plan_of(sources)
    expected = batches(plan, 1, 0, sum(steps for _, steps in stops))
    seen = []
    for world_size, steps in stops:
        seen += batches(plan, world_size, len(seen) * 8, steps)
    assert seen == expected


def test_weights_decide_how_much_of_each_source_is_drawn():
    sources = (Source("large", (9000,), 1.0), Source("small", (1000,), 4.0))
    plan = plan_of(sources, 500)
    drawn = [slot.source for batch in batches(plan, 1, 0, 40) for slot in batch]
    assert np.mean(drawn) == pytest.approx(0.8, abs=0.01)
    assert plan.sequence().epochs(40) == pytest.approx([4000 / 9000, 16.0], rel=0.05)


def test_a_single_source_reports_epochs_of_full_batches():
    plan = BatchPlan(counts=(7, 30), fingerprint="a", seed=0, global_batch_size=8, block_shards=1)
    assert plan.sequence().epochs(6) == [1.5]


@pytest.mark.parametrize("sources", [(), *MIXTURES.values()], ids=["single", *MIXTURES])
@pytest.mark.parametrize("batch", [0, 2, 5, 9])
def test_upcoming_shards_name_every_shard_before_it_is_needed(sources, batch):
    plan = plan_of(sources or MIXTURES["one"])
    if not sources:
        plan = BatchPlan(
            counts=plan.counts, fingerprint="a", seed=3, global_batch_size=8, block_shards=2
        )
    shard_of = np.repeat(np.arange(len(plan.counts)), plan.counts)
    slots = itertools.chain(*batches(plan, 1, batch * 8, 4))
    needed = {int(shard_of[slot.sample_id]) for slot in slots}
    announced = itertools.islice(plan.sequence().upcoming_shards(batch), 3 * len(plan.counts))
    assert needed <= set(announced)


def test_a_source_too_small_for_its_share_is_refused():
    sources = (Source("large", (900,), 1.0), Source("tiny", (3,), 1.0))
    with pytest.raises(UserError, match=r"source 'tiny' has 3 samples but is to give 4\.0 to"):
        plan_of(sources)


def test_the_log_line_names_the_shares():
    text = plan_of(MIXTURES["two"]).describe(2, Progress(16))
    assert "a mixture of 75 % a (25), 25 % b (13), from sample 16 on" in text
