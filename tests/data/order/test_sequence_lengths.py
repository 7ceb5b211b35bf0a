"""Lengths of NaFlex batches: the same on every rank, at every resume, whoever loads them."""

from dataclasses import replace
from itertools import islice

import pytest

from dist_siglip.data.order.position import (
    BatchPlan,
    GlobalBatchSampler,
    Progress,
    SequenceLengths,
)
from dist_siglip.errors import UserError

LENGTHS = SequenceLengths((2, 3, 5), (0.5, 0, 1.5))


def lengths_seen(world_size, rank, num_batches, start=0, **changes):
    """Lengths of consecutive batches of a rank, and the samples in them."""
    plan = replace(PLAN_OF_LENGTHS, **changes)
    progress = Progress(start * plan.global_batch_size)
    sampler = GlobalBatchSampler(plan, rank=rank, world_size=world_size, progress=progress)
    found = []
    for positions in islice(sampler, num_batches):
        (length,) = {at.num_patches for at in positions}
        found.append(length)
    return found


PLAN_OF_LENGTHS = BatchPlan(
    counts=(40, 30),
    fingerprint="abc",
    seed=3,
    global_batch_size=12,
    block_shards=2,
    lengths=LENGTHS,
)


def test_every_rank_of_every_world_draws_one_length_for_each_global_batch():
    expected = lengths_seen(1, 0, 30)
    assert set(expected) == {2, 5}  # a weight of 0 is never drawn
    for world_size in (2, 3, 4):
        for rank in range(world_size):
            assert lengths_seen(world_size, rank, 30) == expected
    # Epochs have 5 batches; a length depends on the number of the batch alone.
    for start in (3, 7, 10):
        assert lengths_seen(2, 1, 10, start) == expected[start : start + 10]
    assert lengths_seen(1, 0, 30, seed=4) != expected


def test_the_comparison_rejects_lengths_that_are_drawn_for_each_rank():
    expected = lengths_seen(1, 0, 30)
    assert [lengths_seen(2, rank, 30, seed=3 + rank) == expected for rank in (0, 1)] == [
        True,
        False,
    ]


def test_lengths_come_as_often_as_their_weights_say():
    drawn = [LENGTHS.of_batch(0, batch) for batch in range(2000)]
    assert drawn.count(2) == pytest.approx(500, abs=75)  # 3.9 standard deviations
    alike = [SequenceLengths().of_batch(1, batch) for batch in range(2000)]
    assert sorted(set(alike)) == [128, 256, 576, 784, 1024]
    assert all(alike.count(each) == pytest.approx(400, abs=72) for each in set(alike))


def test_batches_that_come_in_turns_keep_their_lengths():
    progress = Progress(0)
    sampler = GlobalBatchSampler(PLAN_OF_LENGTHS, rank=0, world_size=1, progress=progress, repeat=3)
    found = [positions[0].num_patches for positions in islice(sampler, 6)]
    assert found == lengths_seen(1, 0, 3) * 2


def test_lengths_are_part_of_what_a_resumed_run_must_share_and_only_where_there_are_any():
    assert PLAN_OF_LENGTHS.identity()["sequence_lengths"] == "2 x 0.5, 3 x 0, 5 x 1.5"
    assert "sequence_lengths" not in replace(PLAN_OF_LENGTHS, lengths=None).identity()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (([], None), r"sequence_lengths \(\[\]\) must be different numbers of patches"),
        (([4, 0], None), r"sequence_lengths \(\[4, 0\]\) must be"),
        (([4, 4], None), r"sequence_lengths \(\[4, 4\]\) must be"),
        (([4, 9], [1.0]), r"length_weights \(\[1.0\]\) must be a number >= 0 for each"),
        (([4, 9], [0, 0]), r"length_weights \(\[0, 0\]\) must be"),
        (([4, 9], [1, -1]), r"length_weights \(\[1, -1\]\) must be"),
        (([4, 9], [1, float("nan")]), r"length_weights \(\[1, nan\]\) must be"),
        ((None, [1, 1]), r"length_weights \(\[1, 1\]\) must be"),
    ],
)
def test_lengths_that_cannot_be_drawn_are_refused_in_one_line(asked, message):
    with pytest.raises(UserError, match=message) as caught:
        SequenceLengths.of(asked, is_flexible=True)
    assert "\n" not in str(caught.value)


def test_lengths_of_a_tower_of_one_size_are_refused_and_none_are_drawn():
    assert SequenceLengths.of((None, None), is_flexible=False) is None
    for asked in (([4], None), (None, [1])):
        with pytest.raises(UserError, match=r"the image tower sees one size; set model.num_patch"):
            SequenceLengths.of(asked, is_flexible=False)
