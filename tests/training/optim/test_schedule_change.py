"""A run that gets another length: its rate goes on, starts anew or is refused, and is not stale."""

import re
from dataclasses import replace

import pytest
import yaml
from torch import nn

from dist_siglip.cli.run.start_point import schedule_change
from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder
from dist_siglip.training.optim import (
    OptimConfig,
    build_optimizer,
    describe_schedule_change,
    how_to_go_on,
    learning_rate_factor,
)

COSINE = OptimConfig(learning_rate=1e-3, warmup_steps=3)
FLAT = replace(COSINE, schedule="constant")


def rates(config, total_steps, num_steps, state=None):
    """Rates of so many steps, and the state after them."""
    optimizer, schedule = build_optimizer(nn.Linear(2, 2), config, total_steps)
    if state is not None:
        optimizer.load_state_dict(state[0])
        schedule.load_state_dict(state[1])
    seen = []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen, (optimizer.state_dict(), schedule.state_dict())


def test_no_step_after_the_change_has_a_rate_of_the_old_schedule(caplog):
    """Seen before: 2.4e-5, 0.0 of the old schedule, 5e-4."""
    caplog.set_level("INFO", "dist_siglip")
    _, end = rates(COSINE, 12, 12)
    again = replace(COSINE, schedule_start_step=12)
    seen, _ = rates(again, 24, 12, end)
    expected = [
        1e-3 * learning_rate_factor(step, warmup_steps=3, total_steps=12) for step in range(12)
    ]
    assert seen == pytest.approx(expected)
    assert "learning rate after step 12: 0.0003333, not 0 as in the checkpoint" in caplog.text


def test_another_highest_rate_replaces_that_of_the_checkpoint():
    """A checkpoint of another run that is gone on with: its rates were kept in silence."""
    _, state = rates(FLAT, 12, 6)
    seen, _ = rates(replace(FLAT, learning_rate=0.5), 12, 2, state)
    assert seen == [0.5, 0.5]


def test_the_same_length_gives_the_same_rates_to_the_bit(caplog):
    whole, _ = rates(COSINE, 12, 12)
    first, state = rates(COSINE, 12, 7)
    rest, _ = rates(COSINE, 12, 5, state)
    assert first + rest == whole
    assert not caplog.records


@pytest.mark.parametrize(
    ("config", "steps_before", "step"),
    [
        (COSINE, 12, 12),
        (COSINE, 48, 30),
        (replace(COSINE, schedule="linear"), 12, 9),
        (replace(FLAT, cooldown_steps=6), 12, 9),
    ],
)
def test_a_jump_is_refused_or_made_on_request(config, steps_before, step):
    message = (
        rf"max_steps \(36\) was {steps_before} up to step {step}: .*schedule_start_step to {step}"
    )
    with pytest.raises(UserError, match=message):
        describe_schedule_change(config, steps_before, config, 36, step)
    willing = replace(config, accept_rate_jump=True)
    assert " jumps from " in describe_schedule_change(config, steps_before, willing, 36, step)
    anew = replace(config, schedule_start_step=step)
    told = describe_schedule_change(config, steps_before, anew, 36, step)
    assert f"starts anew at step {step}; the learning rate of the next step is 0.0003333" in told


@pytest.mark.parametrize(
    ("config", "step"), [(FLAT, 12), (replace(FLAT, cooldown_steps=6), 6), (COSINE, 2)]
)
def test_a_rate_that_stays_goes_on(config, step):
    told = describe_schedule_change(config, 12, config, 24, step)
    assert re.match(r"max_steps was 12 and is 24: the learning rate goes on at ", told)
    assert describe_schedule_change(config, 24, config, 24, step) == ""


def test_a_start_ahead_of_the_run_is_refused():
    ahead = replace(COSINE, schedule_start_step=12)
    with pytest.raises(UserError, match=r"schedule_start_step \(12\) must be at most .* \(8\)"):
        describe_schedule_change(COSINE, 24, ahead, 24, step=8)
    with pytest.raises(UserError, match=r"schedule_start_step \(12\) must be below max_steps"):
        build_optimizer(nn.Linear(1, 1), ahead, total_steps=12)


def test_a_complete_run_says_what_its_schedule_needs():
    assert how_to_go_on(FLAT, 12) == "raise trainer.max_steps"
    assert how_to_go_on(COSINE, 12).endswith("and set model.optim.schedule_start_step to 12")


def test_the_command_line_compares_with_the_configuration_of_the_run(tmp_path):
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    run.checkpoint(12).touch()
    run.config.write_text(yaml.safe_dump({"trainer": {"max_steps": 12}}))

    end = run.checkpoint(12)

    def change(config, steps, start=end):
        return schedule_change(run, {"trainer": {"max_steps": steps}}, config, start)

    with pytest.raises(UserError, match="would jump from 0 to "):
        change(COSINE, 24)
    anew = replace(COSINE, schedule_start_step=12)
    assert "starts anew at step 12" in change(anew, 24)
    assert change(COSINE, 12) == ""
    assert change(COSINE, 24, tmp_path / "other.ckpt") == ""
    with pytest.raises(UserError, match=r"schedule_start_step \(12\) must be at most"):
        change(anew, 24, None)
    # The start that was told of writes the configuration; the next one finds nothing changed.
    settings = {"trainer": {"max_steps": 24}, "model": {"optim": {"schedule_start_step": 12}}}
    run.config.write_text(yaml.safe_dump(settings))
    assert change(anew, 24) == ""


def test_a_run_that_ends_before_its_schedule_leaves_it_to_another(tmp_path):
    """80 % of a cosine, then the rest: the rates are those of one run."""
    whole, _ = rates(COSINE, 12, 12)
    part = replace(COSINE, schedule_steps=12)
    assert part.total_steps(9) == 12
    first, state = rates(part, part.total_steps(9), 9)
    rest, _ = rates(COSINE, COSINE.total_steps(12), 3, state)
    assert first + rest == whole
    assert how_to_go_on(part, 9) == "raise trainer.max_steps"
    with pytest.raises(UserError, match=r"schedule_steps \(12\) must be at least max_steps \(13\)"):
        part.total_steps(13)
    with pytest.raises(UserError, match=r"schedule_steps \(5\) must be above 5, or null"):
        replace(COSINE, schedule_steps=5, schedule_start_step=5)
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    run.checkpoint(9).touch()
    settings = {"trainer": {"max_steps": 9}, "model": {"optim": {"schedule_steps": 12}}}
    run.config.write_text(yaml.safe_dump(settings))
    longer = {"trainer": {"max_steps": 12}}
    assert schedule_change(run, longer, COSINE, run.checkpoint(9)) == ""
    with pytest.raises(UserError, match="would jump from "):
        schedule_change(run, longer, replace(COSINE, schedule_steps=36), run.checkpoint(9))


def test_the_state_of_a_schedule_of_other_groups_is_taken():
    _, (_, state) = rates(COSINE, 12, 7)
    assert len(state["base_lrs"]) == 2
    state["base_lrs"], state["lr_lambdas"] = [1.0] * 3, [{}] * 3
    module = nn.Linear(2, 2)
    optimizer, schedule = build_optimizer(module, COSINE, 12)
    schedule.load_state_dict(state)
    expected = 1e-3 * learning_rate_factor(7, warmup_steps=3, total_steps=12)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 2)
