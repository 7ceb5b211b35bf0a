"""What is said about a loss that falls, levels off, rises again, or never moved."""

import pytest

from dist_siglip.report.sections.training import draw_loss, draw_scale_and_bias, judge
from tests.support.report_records import record


@pytest.mark.parametrize(
    ("losses", "tone", "words"),
    [
        ([9, 5, 3, 2, 1.5, 1.2, 1.0, 0.8], "note", "still falling"),
        ([9, 5, 3, 2, 1.01, 1.0, 1.005, 1.0], "good", "levelled off"),
        ([9, 5, 2, 1, 1.2, 1.3, 1.4, 1.5], "watch", "lowest at step 30"),
        ([2, 2, 2, 2, 2, 2, 2, 2], "bad", "hardly fallen"),
        ([1, 2], "unknown", "Too few"),
    ],
)
def test_conclusion_about_the_validation_loss(losses, tone, words):
    verdict = judge(record(series={"val/loss": losses}))
    assert verdict.tone == tone
    assert words in verdict.text


def test_training_loss_stands_in_for_a_missing_validation_loss():
    verdict = judge(record(series={"train/loss": [9, 5, 3, 2, 1.5, 1.2, 1.0, 0.8]}))
    assert verdict.text.startswith("The training loss is still falling")


def test_a_rising_training_loss_is_no_over_fitting():
    assert judge(record(series={"train/loss": [9, 5, 1, 1.01, 1.03, 1.02]})).tone != "watch"


def test_relative_bias_is_computed_when_it_was_not_logged():
    scales = {"train/logit_scale": [10, 20], "train/logit_bias": [-10, -10]}
    assert "relative bias" in draw_scale_and_bias([record(series=scales)])


def test_scale_of_nothing_gives_no_drawing():
    assert draw_scale_and_bias([record()]) is None


def test_losses_of_captions_that_train_together_are_drawn_of_one_run():
    losses = {"train/loss": [3, 2], "train/pair_loss_alt": [4, 3], "train/pair_loss_long": [2, 1]}
    run = record(series=losses)
    assert all(f"captions {name}" in draw_loss([run]) for name in ("alt", "long"))
    assert "captions" not in draw_loss([run, record("other", series=losses)])
