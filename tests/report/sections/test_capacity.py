"""What the bounds say about a run; the bounds themselves are tested with the metrics."""

import numpy as np
import pytest

from dist_siglip.metrics.capacity import largest_pairs, required_dimension
from dist_siglip.report.sections.capacity import judge, room
from tests.support.report_records import record


def _run(margin, bias, width, lenient=(0.2, 0.4), steps=101):
    features = np.eye(width)
    return record(
        series={"data/epochs": np.linspace(0, 2, steps)},
        metrics={
            "margin": margin,
            "relative_bias": bias,
            "margin_5_95": lenient[0],
            "relative_bias_5_95": lenient[1],
            "gallery_pairs": 500.0,
        },
        arrays={"image_features": features, "text_features": features},
        settings={"data.global_batch_size": 100},
    )


def test_numbers_are_those_of_the_bounds():
    found = room(_run(0.1, 0.1, 64))
    # 1000 steps of 100 pairs are two passes.
    assert found.num_pairs == 50_000
    assert found.needed == required_dimension(50_000, 0.1, 0.1)
    assert found.pairs == largest_pairs(64, 0.1, 0.1)
    assert not found.is_lenient


def test_a_margin_below_zero_is_replaced_by_that_of_quantiles():
    found = room(_run(-0.1, 0.6, 64))
    assert (found.margin, found.relative_bias, found.is_lenient) == (0.2, 0.4, True)


@pytest.mark.parametrize(("width", "tone"), [(8, "watch"), (30, "note"), (400, "good")])
def test_conclusion_compares_the_dimension_with_what_the_pairs_need(width, tone):
    assert required_dimension(50_000, 0.1, 0.1) == (20, 37)
    verdict = judge(_run(0.1, 0.1, width))
    assert verdict.tone == tone
    assert f"At d = {width} and its margin of 0.100 the bounds allow" in verdict.text


def test_a_margin_that_bounds_nothing_is_said_to():
    verdict = judge(_run(-0.1, 0.5, 64, lenient=(-0.05, 0.5)))
    assert verdict.tone == "unknown"
    assert "must be above 0" in verdict.reason


def test_without_features_or_margin_nothing_is_said():
    assert judge(record()).tone == "unknown"
    assert room(record(metrics={"margin": 0.1, "relative_bias": 0.0})) is None
