"""Who waits for whom."""

import pytest

from dist_siglip.report.sections.training import judge_change, judge_speed
from tests.support.report_records import record


@pytest.mark.parametrize(
    ("percent", "tone", "words"),
    [(50, "watch", "50 % of the time"), (20, "note", "20 %"), (2, "good", "bound by its model")],
)
def test_conclusion_about_waiting(percent, tone, words):
    logged = {"train/pairs_per_second": [1000] * 3, "train/data_wait_percent": [percent] * 3}
    verdict = judge_speed(record(series=logged))
    assert verdict.tone == tone
    assert words in verdict.text


def test_a_run_without_speed_says_so():
    assert judge_speed(record()).tone == "unknown"


def test_a_run_that_becomes_slow_is_told_and_noise_is_not():
    slow = record(series={"train/pairs_per_second": [1000] * 10 + [500] * 10})
    noisy = record(series={"train/pairs_per_second": [1000, 900] * 10})
    assert "500 pairs/s after 1,000" in judge_change(slow).text
    assert judge_change(noisy) is None
