"""A step that is not finite on one rank is skipped on all, as if its batch had not been there."""

import math
from types import SimpleNamespace

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.objectives import Captioning
from dist_siglip.runs import RunFolder
from dist_siglip.training.callbacks import SkipBadSteps, WeightAverage
from tests.support.guard_ranks import are_same, train_all
from tests.support.processes import run_ranks
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
]

# Faults are given by the number of steps done before: what is done in step 3 stands under 2.
KINDS = ("pixels", "gradient", "loss")
COMMON = [
    {"name": "without", "keep": [0, 1, 4, 5]},
    *({"name": kind, "keep": range(6), "bad": {2: kind, 3: kind}} for kind in KINDS),
    {"name": "broken", "keep": range(6), "bad": {2: "loss"}, "alone": True},
]
NEVER_MORE = dict.fromkeys(range(4, 100), "loss")
SPIKES = {"spike_factor": 20.0, "spike_window": 4}


def cases_of_two(folder):
    """What is shown on two ranks; several starts of processes would cost more than the runs."""
    back = {"abort_after": 9, "roll_back_after": 2}
    sharded = {"shard": {}, "trainer": {"max_steps": 4}}
    return [
        *COMMON,
        {
            "name": "spike",
            "bad": {4: "large", 7: "loss", 8: "large"},
            "guard": SPIKES,
            "trainer": {"log_every_n_steps": 5},
            "every": 8,
        },
        {"name": "without spike", "keep": [0, 1, 2, 3, 5, 6, 9, 10, 11], "guard": SPIKES},
        {
            "name": "resumed",
            "bad": {8: "large"},
            "guard": SPIKES,
            "trainer": {"max_steps": 12},
            "start": RunFolder(folder / "spike").checkpoint(8),
            "done": 8,
        },
        {"name": "abort", "bad": NEVER_MORE, "guard": {"abort_after": 3}},
        {"name": "back", "keep": range(8), "bad": {4: "loss", 5: "loss", 6: "loss"}, "every": 2,
         "guard": back},
        {"name": "as if back", "keep": [0, 1, 7]},
        {
            "name": "sharded back",
            "keep": range(8),
            "bad": {4: "loss", 5: "loss", 6: "loss"},
            "every": 2,
            "guard": back,
            "shard": {"checkpoint": "sharded"},
        },
        {"name": "as if sharded back", "keep": [0, 1, 7], "shard": {}},
        {"name": "nowhere to go", "keep": range(8), "bad": {4: "loss", 5: "loss"}, "guard": back},
        {"name": "without 4 and 5", "keep": [0, 1, 2, 3, 6, 7]},
        {"name": "SGD", "bad": {1: "pixels"}, "keep": range(4), "optim": "SGD"},
        {"name": "SGD without", "keep": [0, 2, 3], "optim": "SGD"},
        {"name": "sharded", "bad": {1: "pixels", 2: "loss"}, **sharded},
        {"name": "sharded without", "keep": [0, 3], "shard": {}},
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    return write_config(path, ARCHITECTURES["siglip"])


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """Results of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    cases = cases_of_two(folder)
    return run_ranks(train_all, 2, model, str(folder), cases)


def check_common(ranks):
    expected = ranks[0]["without"]
    for found in ranks:
        assert are_same(found["without"], expected)
        for kind in KINDS:
            assert are_same(found[kind], expected), kind
            assert found[kind]["num_skipped"] == 2
            assert found[kind]["metrics"]["train/skipped_steps"] == 2
            assert [line["step"] for line in found[kind]["lines"]] == [3, 4]
    pixels, gradient, loss = (ranks[0][kind]["lines"][0] for kind in KINDS)
    assert (pixels["reason"], pixels["loss"]) == ("loss is not finite", "nan")
    assert pixels["not_finite"] == [{1: 0, 2: 2, 3: 2}[len(ranks)]]
    assert (gradient["reason"], gradient["not_finite"]) == ("gradient is not finite", [])
    assert math.isfinite(gradient["loss"])
    assert (loss["reason"], loss["loss"], loss["not_finite"]) == ("loss is not finite", "inf", [])
    assert loss["samples"] == [0, 1, 2, 3]


def test_one_process_skips_steps_to_the_bit(model, tmp_path):
    """Whether features, a gradient or only the loss is not finite."""
    check_common([train_all(0, 1, model, str(tmp_path), COMMON[:-1])])


# None in parallel: that is drawn by the step, whose number moves where batches are left out.
OBJECTIVE = {"objective": {"weight": 0.5, "start": 2, "parallel": 0.0}}
REASONS = {
    "term": "loss is not finite by its term caption_loss",
    "tokens": "loss is not finite by its term caption_loss",
    "head": "gradient is not finite",
    "pixels": "loss is not finite",
}
OF_OBJECTIVES = [
    {"name": "without", "keep": [0, 1, 4, 5], **OBJECTIVE},
    # The first steps of the heads, of which the optimizer has no state yet, and later ones.
    *({"name": kind, "keep": range(6), "bad": {2: kind, 3: kind}, **OBJECTIVE} for kind in REASONS),
    {"name": "later", "keep": range(7), "bad": {4: "term", 5: "head"}, **OBJECTIVE},
    {"name": "without later", "keep": [0, 1, 2, 3, 6], **OBJECTIVE},
]


_BACK = {"keep": range(8), "bad": dict.fromkeys((4, 5, 6), "term"), "every": 2}
_BACK["guard"] = {"abort_after": 9, "roll_back_after": 2}
_EARLIER, _LATER = ({"objective": {**OBJECTIVE["objective"], "start": step}} for step in (2, 3))
# Sharded, and sent back to a checkpoint of before the objective began.
OF_TWO = [
    *OF_OBJECTIVES,
    {"name": "shards", "keep": range(6), "bad": {2: "term", 3: "tokens"}, "shard": {}, **OBJECTIVE},
    {"name": "shards without", "keep": [0, 1, 4, 5], "shard": {}, **OBJECTIVE},
    {"name": "back", **_BACK, **_LATER},
    {"name": "as if back", "keep": [0, 1, 7], **_EARLIER},
    {"name": "shards back", "shard": {"checkpoint": "sharded"}, **_BACK, **_LATER},
    {"name": "file back", "shard": {"checkpoint": "full"}, **_BACK, **_LATER},
    {"name": "shards as if back", "keep": [0, 1, 7], "shard": {}, **_EARLIER},
]


def check_objectives(ranks):
    for found in ranks:
        for kind, reason in REASONS.items():
            assert are_same(found[kind], ranks[0]["without"]), kind
            assert found[kind]["num_skipped"] == 2
            assert {line["reason"] for line in found[kind]["lines"]} == {reason}
        assert are_same(found["later"], ranks[0]["without later"])


def test_what_is_not_finite_in_an_objective_leaves_heads_and_moments_to_the_bit(model, tmp_path):
    check_objectives([train_all(0, 1, model, str(tmp_path), OF_OBJECTIVES)])


@pytest.mark.faults
def test_two_ranks_skip_what_is_not_finite_in_an_objective_of_one(model, tmp_path):
    ranks = run_ranks(train_all, 2, model, str(tmp_path), OF_TWO)
    check_objectives(ranks)
    for found in ranks:
        assert are_same(found["back"], ranks[0]["as if back"])
        assert found["back"]["num_skipped"] == found["shards back"]["num_skipped"] == 3
    first = ranks[0]  # shards are whole on it
    assert are_same(first["shards"], first["shards without"])
    assert are_same(first["shards back"], first["shards as if back"])
    assert are_same(first["file back"], first["shards as if back"])


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_gradients_that_overflow_float16_leave_heads_and_moments_alone(model, tmp_path):
    """A factor of 2^60 overflows in all steps, one of 2^10 in none."""
    common = {"keep": range(3), "trainer": {"precision": "16-mixed"}, "objective": {"weight": 0.5}}
    cases = [{"name": str(power), "init_scale": 2.0**power, **common} for power in (60, 10)]
    found = train_all(0, 1, model, str(tmp_path), cases)
    start = locked_module(model, objectives=[Captioning(0.5)]).state_dict()
    for name, value in start.items():
        assert torch.equal(found["60"]["state"][name], value)
    assert not any(value.any() for value in found["60"]["moments"])
    output = "objectives.captioning.output.weight"
    assert not torch.equal(found["10"]["state"][output], start[output])
    assert found["60"]["num_skipped"] == found["10"]["num_skipped"] == 0


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_the_search_of_a_scaler_is_not_counted_and_a_loss_that_is_not_finite_is(model, tmp_path):
    """A factor of 2^40 overflows float16 until it is halved often enough."""
    case = {
        "name": "scaled",
        "bad": {20: "pixels"},
        "keep": [*range(12), *range(12), *range(6)],
        "trainer": {"precision": "16-mixed"},
        "init_scale": 2.0**40,
        "guard": {"abort_after": 3},
    }
    found = train_all(0, 1, model, str(tmp_path), [case])["scaled"]
    assert found["num_skipped"] == 1
    assert [line["step"] for line in found["lines"]] == [21]


def test_a_damaged_checkpoint_is_passed_over_when_going_back(model, tmp_path):
    """The newest before the bad steps is of step 4; the one of step 2 is loaded in its place."""
    bad = dict.fromkeys((5, 6), "loss")
    guard = {"abort_after": 9, "roll_back_after": 2}
    case = {"name": "damaged", "keep": range(8), "bad": bad, "every": 2, "guard": guard}
    case["damage"] = 4
    found = train_all(0, 1, model, str(tmp_path), [case, {"name": "as if", "keep": [0, 1, 7]}])
    assert are_same(found["damaged"], found["as if"])


def test_a_schedule_goes_on_through_skipped_steps_and_a_roll_back(model, tmp_path):
    guard = {"abort_after": 9, "roll_back_after": 2}
    plain = {"name": "plain", "keep": range(8), "optim": "falling"}
    case = {"name": "back", "bad": dict.fromkeys((4, 5), "loss"), "every": 2, "guard": guard}
    found = train_all(0, 1, model, str(tmp_path), [plain, {**plain, **case}])
    assert found["back"]["num_skipped"] == 2
    assert found["back"]["rates"] == found["plain"]["rates"]
    assert not are_same(found["back"], found["plain"])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"action": "stop"}, r"step_guard.action \(stop\) must be skip or off"),
        ({"abort_after": 0}, r"step_guard.abort_after \(0\) must be at least 1"),
        ({"spike_factor": 1.0}, r"step_guard.spike_factor \(1.0\) must be above 1"),
        ({"spike_window": 0}, r"step_guard.spike_window \(0\) must be at least 1"),
        ({"roll_back_after": 10}, r"step_guard.roll_back_after \(10\) must .* below abort_after"),
    ],
)
def test_settings_out_of_range_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        SkipBadSteps(**settings)


def test_an_average_of_the_weights_cannot_be_sent_back():
    trainer = SimpleNamespace(callbacks=[WeightAverage()])
    with pytest.raises(UserError, match=r"roll_back_after \(2\) cannot send an average"):
        SkipBadSteps(roll_back_after=2).setup(trainer, SimpleNamespace(step_check=None), "fit")


def test_a_module_that_knows_of_no_check_is_refused():
    with pytest.raises(UserError, match="cannot skip steps of SimpleNamespace"):
        SkipBadSteps().setup(SimpleNamespace(callbacks=[]), SimpleNamespace(), "fit")


def test_without_the_guard_a_loss_that_is_not_finite_ends_the_run(model, tmp_path):
    case = {"name": "off", "bad": {1: "pixels"}, "guard": {"action": "off"}}
    with pytest.raises(UserError, match="image_features row 0 is not finite"):
        train_all(0, 1, model, str(tmp_path), [case])


def test_without_the_guard_a_term_that_is_not_finite_is_named(model, tmp_path):
    """At its own step, not as features that are not finite at the next one."""
    case = {"name": "off", "bad": {3: "tokens"}, "guard": {"action": "off"}, **OBJECTIVE}
    with pytest.raises(UserError, match="caption_loss of objectives is not finite at step 4") as e:
        train_all(0, 1, model, str(tmp_path), [case])
    assert "\n" not in str(e.value)


@pytest.mark.faults
def test_two_ranks_skip_what_is_wrong_on_one_of_them(two):
    check_common(two)


@pytest.mark.faults
def test_three_ranks_with_uneven_batches_skip_what_is_wrong_on_one_of_them(model, tmp_path):
    ranks = run_ranks(train_all, 3, model, str(tmp_path), COMMON)
    check_common(ranks)
    assert "must be equal on all ranks" in ranks[2]["broken"]["error"]


@pytest.mark.faults
def test_a_variant_that_skips_on_one_rank_only_is_rejected(two):
    for found in two:
        assert "logit_scale is " in found["broken"]["error"]
        assert "must be equal on all ranks" in found["broken"]["error"]


@pytest.mark.faults
def test_spikes_of_the_gradient_norm_are_skipped_on_all_ranks(two):
    for found in two:
        assert are_same(found["spike"], two[0]["without spike"])
        assert found["spike"]["num_skipped"] == 3
    reasons = [(line["step"], line["reason"]) for line in two[0]["spike"]["lines"]]
    assert [step for step, _ in reasons] == [5, 8, 9]
    assert reasons[0][1].endswith("is a spike")
    assert reasons[1][1] == "loss is not finite"


@pytest.mark.faults
def test_ranks_whose_norms_are_rounded_apart_agree_on_a_spike(two):
    assert [found["spike on the last rank"] for found in two] == [True, True]


@pytest.mark.faults
def test_a_resumed_run_judges_counts_and_ends_as_one_that_was_not_stopped(two):
    """The checkpoint is written at step 8, whose skip is read at step 10."""
    for found in two:
        assert are_same(found["resumed"], found["spike"])
        assert found["resumed"]["num_skipped"] == found["spike"]["num_skipped"]


@pytest.mark.faults
def test_many_skipped_steps_in_a_row_end_the_run_on_every_rank(two):
    for found in two:
        assert found["abort"]["error"].startswith("3 steps in a row were skipped, 5 to 7, and")
    assert [line["step"] for line in two[0]["abort"]["lines"]] == [5, 6, 7]


@pytest.mark.faults
def test_a_roll_back_goes_on_from_the_checkpoint_with_the_batches_after_the_bad_ones(two):
    """Step 4 has the weights there are, so step 2 is loaded; the batch of step 8 comes next."""
    for found in two:
        assert are_same(found["back"], two[0]["as if back"])
        assert found["back"]["num_skipped"] == 3


@pytest.mark.faults
def test_a_sharded_model_rolls_back_too(two):
    assert are_same(two[0]["sharded back"], two[0]["as if sharded back"])


@pytest.mark.faults
def test_a_roll_back_without_a_checkpoint_goes_on_where_it_is(two):
    assert are_same(two[1]["nowhere to go"], two[0]["without 4 and 5"])


@pytest.mark.faults
def test_an_optimizer_without_a_fused_kernel_skips_too(two):
    for found in two:
        assert are_same(found["SGD"], two[0]["SGD without"])


@pytest.mark.faults
def test_a_sharded_model_skips_too(two):
    assert two[0]["sharded"]["num_skipped"] == two[1]["sharded"]["num_skipped"] == 2
    assert are_same(two[0]["sharded"], two[0]["sharded without"])
