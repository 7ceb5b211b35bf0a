"""What a run that gets another length does to its learning rate.

A schedule that comes down to the end of the run is bound to its length: with another one, the rate
of the step where the run goes on is another, too.
"""

import math

from dist_siglip.errors import UserError
from dist_siglip.optim.build import OptimConfig, scheduled_factor

_NO_JUMP = 1e-3  # of the highest rate


def describe_schedule_change(
    before: OptimConfig, steps_before: int, now: OptimConfig, steps_now: int, step: int
) -> str:
    """Say what becomes of the learning rate of a run that goes on with another length.

    Args:
        before: settings that the run had.
        steps_before: its length with them, in optimizer steps.
        now: settings that it has now.
        steps_now: its length with them.
        step: optimizer steps behind it, fewer than ``steps_now``.

    Returns:
        One line for the log; empty if nothing has changed.

    Raises:
        UserError: if the rate would jump and the settings do not ask for it, or
            schedule_start_step is ahead of the run.

    Example:
        >>> flat = OptimConfig(learning_rate=0.5, schedule="constant")
        >>> describe_schedule_change(flat, 12, flat, 24, step=12)
        'max_steps was 12 and is 24: the learning rate goes on at 0.5, constant to step 24'
    """
    start = now.schedule_start_step
    if start > step:
        raise UserError(
            f"model.optim.schedule_start_step ({start}) must be at most the step training goes on "
            f"from ({step})"
        )
    starts_anew = start != before.schedule_start_step
    if steps_before == steps_now and not starts_anew:
        return ""
    old, new = (
        scheduled_factor(config, steps, step)
        for config, steps in ((before, steps_before), (now, steps_now))
    )
    old_rate, new_rate = (f"{now.learning_rate * factor:.4g}" for factor in (old, new))
    changed = f"max_steps was {steps_before} and is {steps_now}"
    if starts_anew:
        return (
            f"{changed}: the {now.schedule} schedule starts anew at step {start}; the learning "
            f"rate of the next step is {new_rate}, the old schedule's was {old_rate}"
        )
    if math.isclose(old, new, abs_tol=_NO_JUMP):
        return f"{changed}: the learning rate goes on at {new_rate}, {now.schedule} to step " + str(
            steps_now
        )
    if not now.accept_rate_jump:
        raise UserError(
            f"trainer.max_steps ({steps_now}) was {steps_before} up to step {step}: the learning "
            f"rate would jump from {old_rate} to {new_rate}, into the {now.schedule} schedule of "
            f"the new length; set model.optim.schedule_start_step to {step} to warm up and come "
            "down again from there, model.optim.accept_rate_jump to true, or max_steps to "
            f"{steps_before}"
        )
    return (
        f"{changed}: the learning rate jumps from {old_rate} to {new_rate} and follows the "
        f"{now.schedule} schedule of the new length"
    )


def how_to_go_on(config: OptimConfig, step: int) -> str:
    """Say how a run that is complete is trained on.

    Example:
        >>> how_to_go_on(OptimConfig(schedule="constant"), 12)
        'raise trainer.max_steps'
    """
    if config.schedule == "constant" and not config.cooldown_steps:
        return "raise trainer.max_steps"
    return f"raise trainer.max_steps and set model.optim.schedule_start_step to {step}"
