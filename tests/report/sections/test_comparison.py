"""The best of several runs, and whether that is more than noise."""

import pytest

from dist_siglip.report.records import Picture
from dist_siglip.report.sections.comparison import common_step, judge, make, mean_recall
from tests.support.report_records import record

BOTH = ("image_to_text_recall@1", "text_to_image_recall@1")


def _run(name, recall, pairs=1000.0, **parts):
    numbers = {**dict.fromkeys(BOTH, recall), "gallery_pairs": pairs}
    return record(name, metrics=numbers | parts.pop("metrics", {}), **parts)


def _logged(name, *recalls):
    """A run with an evaluation every ten steps, the newest of which is written down."""
    last = {"step": 10.0 * (len(recalls) - 1)}
    series = {f"val/{key}": recalls for key in BOTH}
    return _run(name, recalls[-1], metrics=last, series=series)


def test_error_is_that_of_a_share():
    assert mean_recall(_run("a", 0.5, pairs=400.0)) == (0.5, pytest.approx(0.025))


@pytest.mark.parametrize(
    ("recalls", "tone", "words"),
    [
        ((0.5, 0.7), "good", "b has the highest recall@1, beyond noise"),
        ((0.50, 0.51), "note", "b has the highest recall@1, within noise of a"),
        ((0.9, 0.1), "good", "a has the highest"),
    ],
)
def test_conclusion_about_the_best(recalls, tone, words):
    runs = [_run(name, recall) for name, recall in zip("ab", recalls, strict=True)]
    best, verdict = judge(runs)
    assert best.name == words[0]
    assert words in verdict.text
    assert verdict.tone == tone


def test_galleries_of_other_sizes_do_not_compare():
    _, verdict = judge([_run("a", 0.9, pairs=10.0), _run("b", 0.5)])
    assert verdict.tone == "watch"
    assert "cannot be compared: they were evaluated on different data" in verdict.text
    assert "numbers of pairs (a 10, b 1,000)" in verdict.reason


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"captions": ["x", "y"]}, {"captions": ["x", "z"]}, "the captions"),
        (
            {"captions": ["x"], "pictures": [Picture(0, "a")]},
            {"captions": ["x"], "pictures": [Picture(0, "b")]},
            "the pictures",
        ),
        (
            {"settings": {"data.val_shards": "a.tar"}},
            {"settings": {"data.val_shards": "b.tar"}},
            "data.val_shards",
        ),
        (
            {"captions": ["x"], "settings": {"data.transparency": "#ffffff"}},
            {"captions": ["x"], "settings": {"model.model": "before there was a choice"}},
            "data.transparency (a #ffffff, b drop)",
        ),
        (
            {"captions": ["x"], "settings": {"data.picture_id": "bytes"}},
            {"captions": ["x"], "settings": {"data.picture_id": "url"}},
            "data.picture_id (a bytes, b url)",
        ),
    ],
)
def test_other_validation_data_do_not_compare(first, second, told):
    """However far apart the numbers are, no run is called the best."""
    _, verdict = judge([_run("a", 0.1, **first), _run("b", 0.9, **second)])
    assert verdict.tone == "watch"
    assert "cannot be compared" in verdict.text
    assert told in verdict.reason


def test_the_same_pairs_under_another_path_compare():
    parts = {"captions": ["x", "y"], "pictures": [Picture(0, "a")]}
    runs = [
        _run(name, recall, settings={"data.val_shards": f"/{name}.tar"}, **parts)
        for name, recall in (("a", 0.1), ("b", 0.9))
    ]
    assert judge(runs)[1].tone == "good"


def test_runs_of_different_length_are_compared_at_the_last_step_in_common():
    """The longer run ends higher, and was behind at the step of the other."""
    short, long = _logged("short", 0.1, 0.3, 0.6), _logged("long", 0.1, 0.2, 0.4, 0.9)
    best, verdict = judge([long, short])
    assert best is short
    assert verdict.tone == "good"
    assert verdict.text.startswith("At step 20, the last at which all were evaluated: short has")
    assert "Mean recall@1 0.600, then 0.400 of long" in verdict.reason
    assert "long at step 30, short at step 20; these do not compare" in verdict.reason
    assert common_step([short, long]) == 20


def test_runs_without_a_step_in_common_do_not_compare():
    early = _run("early", 0.2, metrics={"step": 5.0})
    _, verdict = judge([early, _logged("late", 0.1, 0.9)])
    assert verdict.tone == "watch"
    assert "at different steps, and at none in common" in verdict.text
    assert "early at step 5, late at step 10" in verdict.reason


def test_the_page_says_at_which_step_numbers_were_measured():
    html = make([_logged("a", 0.1, 0.2), _logged("b", 0.1, 0.2, 0.3)]).render()
    assert "step 10" in html
    assert "step 20" in html


def test_shares_that_are_none_are_not_compared():
    assert mean_recall(_run("a", 1.5)) is None
    assert judge([_run("a", -1.0), _run("b", 0.5)])[1].tone == "unknown"


def test_a_run_without_evaluation_is_not_compared():
    assert judge([_run("a", 0.9), record("b")])[1].tone == "unknown"


def test_a_single_run_is_not_compared():
    assert make([_run("a", 0.9)]) is None
