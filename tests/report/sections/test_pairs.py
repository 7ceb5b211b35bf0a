"""Histograms of both kinds of pairs, and whether a threshold parts them."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dist_siglip.report.sections.pairs import draw_logits, judge, probability_of_order
from tests.support.report_records import histograms, record


def _texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text") if element.text]


def test_logits_are_drawn_on_the_scale_of_the_model():
    arrays = histograms([0.5, 0.6], [0.1, 0.0, -0.1])
    assert "logit" in _texts(draw_logits(arrays, 100.0, -30.0))
    assert "cosine" in _texts(draw_logits(arrays, None, -30.0))


def test_one_kind_without_pairs_is_no_obstacle():
    assert draw_logits(histograms([0.5], []), 10.0, -5.0) is not None


def test_nothing_to_draw_gives_no_drawing():
    assert draw_logits({}, 10.0, -5.0) is None
    assert draw_logits(histograms([], []), 10.0, -5.0) is None
    broken = histograms([0.5], [0.1]) | {"positive_histogram": np.zeros(3)}
    assert draw_logits(broken, 10.0, -5.0) is None


def test_probability_of_order_counts_every_pair_of_pairs():
    generator = np.random.default_rng(0)
    positive, negative = generator.uniform(-0.5, 1, 40), generator.uniform(-1, 0.6, 50)
    bins = [np.floor((each + 1) * 100) for each in (positive, negative)]
    counted = sum((p > n) + 0.5 * (p == n) for p in bins[0] for n in bins[1]) / (40 * 50)
    assert probability_of_order(histograms(positive, negative)) == pytest.approx(counted, abs=1e-12)


@pytest.mark.parametrize(
    ("margin", "lenient", "tone"), [(0.1, 0.2, "good"), (-0.1, 0.2, "note"), (-0.3, -0.1, "watch")]
)
def test_conclusion_about_the_margin(margin, lenient, tone):
    metrics = {"margin": margin, "margin_5_95": lenient, "relative_bias_5_95": 0.5}
    assert judge(record(metrics=metrics)).tone == tone


def test_without_margins_nothing_is_said():
    assert judge(record(metrics={"margin": float("nan")})).tone == "unknown"
