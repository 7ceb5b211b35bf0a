from dataclasses import replace

import pytest

from dist_siglip.data.order.position import BatchPlan
from dist_siglip.data.order.sequence import Source
from dist_siglip.errors import UserError
from dist_siglip.training.datamodule.training_position import (
    describe_shard_changes,
    position_to_resume_at,
)

PLAN = BatchPlan(
    counts=(10, 20, 7), fingerprint="abc", seed=3, global_batch_size=8, block_shards=2
)  # 4 batches an epoch
LINES = "a.tar\t10\t01\nb.tar\t20\t02\nc.tar\t7\t03"
GROWN = replace(PLAN, counts=(10, 20, 9, 9), fingerprint="abd")  # 6 batches an epoch
GROWN_LINES = "a.tar\t10\t01\nb.tar\t20\t02\nc.tar\t9\t04\nd.tar\t9\t05"


def saved(consumed=40, **changes):
    return {"samples_consumed": consumed, **PLAN.identity(), "shards": LINES, **changes}


def test_the_same_sequence_goes_on_at_the_next_sample():
    assert position_to_resume_at(PLAN, LINES, saved()) == 40


@pytest.mark.parametrize(
    ("name", "then"), [("seed", 4), ("global_batch_size", 16), ("block_shards", 1)]
)
@pytest.mark.parametrize("accept", [False, True])
def test_other_batches_are_refused_by_name_whatever_is_accepted(name, then, accept):
    text = rf"{name} was {then} when the checkpoint was written and is {PLAN.identity()[name]} now"
    with pytest.raises(UserError, match=text):
        position_to_resume_at(PLAN, LINES, saved(**{name: then}), accept_changed_data=accept)


def test_a_value_that_was_not_recorded_is_said_so():
    with pytest.raises(UserError, match="seed was not recorded"):
        position_to_resume_at(PLAN, LINES, {"samples_consumed": 8})


def test_changed_data_are_refused_with_the_difference():
    with pytest.raises(UserError) as caught:
        position_to_resume_at(GROWN, GROWN_LINES, saved())
    assert str(caught.value) == (
        "cannot resume at the exact sample: the training shards changed: 1 shard is new (first "
        "'d.tar'); 1 shard changed (first 'c.tar': 7 samples, now 9); 37 samples then, 48 now; set "
        "it back, or start a new run in another folder, or set accept_changed_data to go on with "
        "these"
    )


@pytest.mark.parametrize(("consumed", "epochs"), [(0, 0), (8, 1), (32, 1), (40, 2), (64, 2)])
def test_accepted_data_begin_the_next_epoch(consumed, epochs):
    position = position_to_resume_at(GROWN, GROWN_LINES, saved(consumed), accept_changed_data=True)
    assert position == epochs * 6 * 8


def test_an_accepted_mixture_keeps_its_position():
    plan = replace(GROWN, sources=(Source("x", (10, 20), 1.0), Source("y", (9, 9), 1.0)))
    assert position_to_resume_at(plan, GROWN_LINES, saved(), accept_changed_data=True) == 40
    with pytest.raises(UserError, match=r"sources were \[\] and are \[x x 1, y x 1\] now"):
        position_to_resume_at(plan, GROWN_LINES, saved())


@pytest.mark.parametrize(
    ("after", "changes"),
    [
        (LINES, []),
        ("a.tar\t10\t01", ["2 shards are gone (first 'b.tar')"]),
        (LINES.replace("\t02", "\t22"), ["1 shard changed (first 'b.tar': other members)"]),
        ("\n".join(LINES.split("\n")[::-1]), ["the same shards in another order"]),
    ],
)
def test_changes_of_shards_are_named(after, changes):
    assert [*describe_shard_changes(LINES, after)] == changes


def test_without_a_record_nothing_is_claimed():
    assert [*describe_shard_changes("", LINES)] == []
