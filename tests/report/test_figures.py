"""Drawings are SVG that fits a page, and are left out when there is nothing to draw."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dist_siglip.report.figures import (
    draw_logits,
    draw_loss,
    draw_modalities,
    draw_scale_and_bias,
)
from dist_siglip.report.records import Series


def _series(*values):
    return Series(np.arange(len(values)) * 10, np.array(values, dtype=float))


def _arrays(positive, negative):
    edges = np.linspace(-1, 1, 20_001)
    return {
        "histogram_edges": edges,
        "positive_histogram": np.histogram(positive, edges)[0],
        "negative_histogram": np.histogram(negative, edges)[0],
    }


def _texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text") if element.text]


def test_loss_is_drawn_for_training_and_validation():
    svg = draw_loss({"train/loss": _series(3, 2, 1), "val/loss": _series(2.5, 1.5)})
    assert {"training batches", "validation", "loss", "optimizer step"} <= set(_texts(svg))


def test_loss_axis_is_logarithmic_only_where_that_helps():
    # A linear axis labels its top "30"; a logarithmic one has powers of ten.
    assert "30" not in _texts(draw_loss({"train/loss": _series(30, 1, 0.1)}))
    assert "30" in _texts(draw_loss({"train/loss": _series(30, 1, 0.0)}))
    assert "30" in _texts(draw_loss({"train/loss": _series(30, 25, 20)}))


def test_one_point_is_enough():
    assert draw_loss({"val/loss": _series(1.0)}) is not None


def test_relative_bias_is_computed_when_it_was_not_logged():
    series = {"train/logit_scale": _series(10, 20), "train/logit_bias": _series(-10, -10)}
    assert "relative bias" in _texts(draw_scale_and_bias(series))


def test_long_runs_are_thinned():
    many = Series(np.arange(200_000), np.random.default_rng(0).random(200_000))
    assert len(draw_loss({"train/loss": many})) < 200_000


def test_modalities_are_drawn_with_two_markers_in_a_picture():
    points = np.random.default_rng(0).normal(size=(2, 50, 8)).astype(np.float32)
    svg = draw_modalities(*points)
    assert {"images", "texts"} <= set(_texts(svg))
    assert "data:image/png;base64," in svg


@pytest.mark.parametrize("shape", [(1, 8), (50, 1)])
def test_modalities_without_a_plane_are_left_out(shape):
    assert draw_modalities(np.ones(shape), np.ones(shape)) is None


def test_collapsed_modalities_are_left_out():
    assert draw_modalities(np.ones((20, 4)), np.ones((20, 4))) is None


def test_logits_are_drawn_on_the_scale_of_the_model():
    arrays = _arrays([0.5, 0.6], [0.1, 0.0, -0.1])
    assert "logit" in _texts(draw_logits(arrays, 100.0, -30.0))
    assert "cosine" in _texts(draw_logits(arrays, None, -30.0))


def test_one_kind_without_pairs_is_no_obstacle():
    assert draw_logits(_arrays([0.5], []), 10.0, -5.0) is not None


def test_nothing_to_draw_gives_no_drawing():
    assert draw_loss({}) is None
    assert draw_scale_and_bias({"train/loss": _series(1)}) is None
    assert draw_logits({}, 10.0, -5.0) is None
    assert draw_logits(_arrays([], []), 10.0, -5.0) is None
    broken = _arrays([0.5], [0.1]) | {"positive_histogram": np.zeros(3)}
    assert draw_logits(broken, 10.0, -5.0) is None


def test_drawings_of_one_page_share_no_ids():
    first = draw_loss({"train/loss": _series(3, 2, 1)})
    second = draw_scale_and_bias({"train/logit_scale": _series(3, 2, 1)})
    ids = [
        {element.get("id") for element in ElementTree.fromstring(svg).iter()} - {None}
        for svg in (first, second)
    ]
    assert ids[0]
    assert ids[1]
    assert not ids[0] & ids[1]
