import math
import typing

import pytest

from dist_siglip.training.optim import Schedule, learning_rate_factor


@pytest.mark.parametrize("schedule", typing.get_args(Schedule))
def test_schedule_at_start_warm_up_end_middle_and_end(schedule):
    def at(step):
        return learning_rate_factor(
            step, warmup_steps=10, total_steps=110, schedule=schedule, min_fraction=0.2
        )

    constant = schedule == "constant"
    assert at(0) == pytest.approx(0.1)
    assert at(9) == 1.0
    assert at(10) == 1.0
    assert at(60) == pytest.approx(1.0 if constant else 0.6)
    assert at(110) == pytest.approx(1.0 if constant else 0.2)
    assert at(1000) == at(110)
    assert all(at(step) >= at(step + 1) for step in range(10, 110))


def test_cosine_is_a_cosine():
    value = learning_rate_factor(25, warmup_steps=0, total_steps=100)
    assert value == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    quarter = learning_rate_factor(25, warmup_steps=0, total_steps=100, schedule="linear")
    assert quarter == pytest.approx(0.75)


def test_no_warm_up_starts_at_the_top():
    assert learning_rate_factor(0, warmup_steps=0, total_steps=5) == 1.0


def test_constant_cools_down_at_the_end_and_never_below_its_floor():
    options = {"warmup_steps": 10, "total_steps": 100, "schedule": "constant", "min_fraction": 0.2}
    seen = [
        learning_rate_factor(s, **options, cooldown_steps=20) for s in (9, 10, 80, 90, 100, 200)
    ]
    assert seen == pytest.approx([1, 1, 1, 0.6, 0.2, 0.2])
    assert learning_rate_factor(99, **options) == 1
