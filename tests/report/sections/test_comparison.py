"""The best of several runs, and whether that is more than noise."""

import pytest

from dist_siglip.report.sections.comparison import judge, make, mean_recall
from tests.support.report_records import record


def _run(name, recall, pairs=1000.0):
    return record(
        name,
        metrics={
            "image_to_text_recall@1": recall,
            "text_to_image_recall@1": recall,
            "gallery_pairs": pairs,
        },
    )


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
    assert "not among as many pairs" in verdict.text


def test_a_run_without_evaluation_is_not_compared():
    assert judge([_run("a", 0.9), record("b")])[1].tone == "unknown"


def test_a_single_run_is_not_compared():
    assert make([_run("a", 0.9)]) is None
