"""When a number counts as reproduced."""

import math

import pytest

from dist_siglip.errors import UserError
from dist_siglip.lab import LabSettings, judge, judge_claim
from dist_siglip.lab.experiments import EXPERIMENTS, check_names, function_of


@pytest.mark.parametrize(
    ("published", "ours", "tolerance", "verdict"),
    [
        (0.25, 0.26, 0.011, "reproduced"),
        (0.25, 0.26, 0.009, "differs"),
        (-1.0, -1.0, None, "reproduced"),
        (0.25, math.nan, 1.0, "differs"),
        (None, 0.3, 0.1, "no published value"),
    ],
)
def test_a_number_is_reproduced_within_its_tolerance(published, ours, tolerance, verdict):
    assert judge("x", published, ours, tolerance).verdict == verdict


def test_a_correction_explains_only_what_is_off():
    off = judge("x", 1.0, 2.0, 0.5, correction="because")
    assert off.verdict == "corrected: because"
    assert off.is_sound
    assert judge("x", 1.0, 1.4, 0.5, correction="because").verdict == "reproduced"


def test_a_reason_explains_without_deciding_who_is_right():
    assert judge("x", 1.0, 2.0, 0.5, reason="because").verdict == "differs: because"
    assert judge("x", 1.0, 2.0, 0.5, reason="because").is_sound
    assert judge("x", 1.0, 1.4, 0.5, reason="because").verdict == "reproduced"


def test_a_claim_is_reproduced_if_it_holds():
    assert judge_claim("x", "below 2", 1.0, 1.0 < 2).verdict == "reproduced"
    assert not judge_claim("x", "below 2", 3.0, 3.0 < 2).is_sound


def test_progress_of_parts_fills_the_whole():
    seen = []
    settings = LabSettings(progress=seen.append)
    for number in range(2):
        for step in (0.5, 1.0):
            settings.part(number, 2).progress(step)
    assert seen == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_experiment_of_the_catalogue_can_be_imported(name):
    assert callable(function_of(name))
    assert EXPERIMENTS[name].summary.endswith("?")


def test_an_unknown_experiment_is_named_with_the_nearest():
    with pytest.raises(UserError, match="no experiment 'seperator'; did you mean separator"):
        check_names(["constructions", "seperator"])
