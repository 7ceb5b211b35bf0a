import re

import pytest

from dist_siglip.errors import UserError
from dist_siglip.training.callbacks import CollapseAlarm

GOOD = {
    "positive_logit_mean": 4.0,
    "positive_logit_std": 1.0,
    "negative_logit_mean": -6.0,
    "negative_logit_std": 1.0,
    "image_effective_rank": 40.0,
    "text_effective_rank": 38.0,
    "image_to_text_recall@1": 0.6,
    "text_to_image_recall@1": 0.5,
    "gallery_pairs": 1000.0,
}


def signs_after(*changes, **settings):
    """Signs of the last of several evaluations."""
    alarm, found = CollapseAlarm(**settings), []
    for change in changes:
        found = alarm.look({**GOOD, **change})
    return found


def test_a_model_that_stays_or_improves_raises_no_alarm():
    better = {"image_to_text_recall@1": 0.7, "image_effective_rank": 50.0}
    assert signs_after({}, {}, better, {}) == []


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"positive_logit_mean": -5.5}, r"positive and negative logits meet \(0.50 apart, 10.00\)"),
        ({"text_effective_rank": 18.0}, "text_effective_rank fell from 38.0 to 18.0"),
        ({"image_to_text_recall@1": 0.5}, "image_to_text_recall@1 is 0.500, and was 0.600"),
    ],
)
def test_each_sign_is_told_with_its_numbers(change, sign):
    (found,) = signs_after({}, change)
    assert re.search(sign, found)


def test_a_collapse_shows_all_signs():
    gone = {
        "positive_logit_mean": -6.0,
        "image_effective_rank": 1.0,
        "text_effective_rank": 1.0,
        "image_to_text_recall@1": 0.001,
        "text_to_image_recall@1": 0.001,
    }
    assert len(signs_after({}, gone)) == 5


def test_noise_of_a_small_gallery_is_no_sign():
    lower = {"image_to_text_recall@1": 0.5, "gallery_pairs": 100.0}
    assert signs_after({"gallery_pairs": 100.0}, lower) == []


def test_a_run_from_random_weights_begins_without_signs():
    """Its logits start together and its recall at chance; that is no collapse."""
    random = {
        "positive_logit_mean": -5.9,
        "image_to_text_recall@1": 0.001,
        "text_to_image_recall@1": 0.001,
    }
    worse = {**random, "positive_logit_mean": -6.01}
    assert signs_after(random, worse, {}) == []


def test_a_resumed_run_compares_with_its_own_start():
    first, second = CollapseAlarm(), CollapseAlarm()
    first.look(GOOD)
    second.load_state_dict(first.state_dict())
    assert second.look({**GOOD, "text_to_image_recall@1": 0.1})


@pytest.mark.parametrize(
    "settings",
    [{"action": "shout"}, {"rank_share": 1.0}, {"logit_separation": 0.0}, {"recall_errors": -1.0}],
)
def test_a_wrong_setting_is_named(settings):
    name = next(iter(settings))
    with pytest.raises(UserError, match=rf"collapse_alarm.{name} \("):
        CollapseAlarm(**settings)
