"""What is said about bad samples, skipped steps and equal captions."""

from dist_siglip.report.history import Incidents, Reasons
from dist_siglip.report.sections.training import judge_captions, judge_samples, judge_steps
from tests.support.report_records import record

BATCH = {"data.global_batch_size": 100}


def _replaced(count):
    return record(series={"train/substituted_samples": [0] * 100 + [count]}, settings=BATCH)


def test_sound_data_is_good():
    assert judge_samples(_replaced(0)).tone == "good"


def test_bad_samples_are_set_against_those_seen():
    # 1000 steps of 100 pairs.
    assert judge_samples(_replaced(50)).tone == "note"
    many = judge_samples(_replaced(500))
    assert many.tone == "watch"
    assert "500 bad sample(s) were replaced by others, 0.50 % of those seen" in many.text


def test_the_most_frequent_reason_is_named():
    reasons = Reasons()
    for reason in ("truncated after 12 bytes", "truncated after 13 bytes", "no caption"):
        reasons.add(reason, reason)
    run = record(series={"train/substituted_samples": [3]}, incidents=Incidents(reasons, Reasons()))
    assert judge_samples(run).reason == "Most often: truncated after # bytes."


def test_skipped_steps_are_told_only_if_there_are_any():
    assert judge_steps(record(series={"train/skipped_steps": [0.0] * 101})) is None
    assert judge_steps(record(series={"train/skipped_steps": [0.0] * 100 + [5]})).tone == "note"
    assert judge_steps(record(series={"train/skipped_steps": [0.0] * 100 + [50]})).tone == "watch"


def test_a_gallery_of_equal_captions_is_told():
    assert judge_captions(record(metrics={"gallery_pairs": 10, "distinct_captions": 9})) is None
    repeated = record(metrics={"gallery_pairs": 10, "distinct_captions": 4})
    assert "Only 4 of 10" in judge_captions(repeated).text
