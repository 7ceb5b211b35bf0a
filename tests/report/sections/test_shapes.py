"""The views of the space: axes, spheres, and what changed between two of them."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dist_siglip.report.sections.shapes import axes_of, draw_modalities, draw_spheres, judge
from tests.support.report_records import kept, record


def _clouds(gap, spread, seed=0, width=6):
    """Images and texts around two centres ``gap`` apart along the first direction."""
    generator = np.random.default_rng(seed)
    centre = np.eye(width)[0] * gap / 2
    noise = spread * generator.normal(size=(2, 60, width))
    return noise[0] + np.eye(width)[1] + centre, noise[1] + np.eye(width)[1] - centre


def test_modalities_are_drawn_with_two_markers_in_a_picture():
    points = np.random.default_rng(0).normal(size=(2, 50, 8)).astype(np.float32)
    svg = draw_modalities(*points)
    texts = [e.text.strip() for e in ElementTree.fromstring(svg).iter("text") if e.text]
    assert {"images", "texts"} <= set(texts)
    assert "data:image/png;base64," in svg


@pytest.mark.parametrize("shape", [(1, 8), (50, 1)])
def test_modalities_without_a_plane_are_left_out(shape):
    assert draw_modalities(np.ones(shape), np.ones(shape)) is None


def test_collapsed_modalities_are_left_out():
    assert draw_modalities(np.ones((20, 4)), np.ones((20, 4))) is None


def test_axes_are_orthonormal_and_begin_with_the_gap():
    evaluation = kept(0, *_clouds(1.0, 0.1))
    axes = axes_of(evaluation)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    difference = evaluation.image_features.mean(0) - evaluation.text_features.mean(0)
    assert np.allclose(axes[:, 0], difference / np.linalg.norm(difference), atol=1e-12)


def test_of_all_axes_across_the_gap_the_others_hold_most():
    evaluation = kept(0, *_clouds(0.5, 0.3, seed=1))
    axes = axes_of(evaluation)
    rows = np.concatenate([evaluation.image_features, evaluation.text_features])
    held = ((rows @ axes[:, 1:]) ** 2).sum()
    generator = np.random.default_rng(2)
    for _ in range(200):
        pair = generator.normal(size=(6, 2))
        pair -= np.outer(axes[:, 0], axes[:, 0] @ pair)
        pair = np.linalg.qr(pair)[0]
        assert ((rows @ pair) ** 2).sum() <= held + 1e-9


def test_axes_do_not_need_a_gap_or_three_dimensions():
    same = np.random.default_rng(0).normal(size=(20, 2))
    axes = axes_of(kept(0, same, same))
    assert axes.shape == (2, 3)
    assert np.allclose(axes[:, :2].T @ axes[:, :2], np.eye(2), atol=1e-12)
    assert not axes[:, 2].any()


def test_three_dimensions_are_held_whole():
    points = np.random.default_rng(0).normal(size=(2, 30, 3))
    drawings, share = draw_spheres([kept(7, *points)], name="sphere")
    assert share == pytest.approx(1, abs=1e-12)
    assert drawings[0][0] == "step 7"


@pytest.mark.parametrize(
    ("first", "last", "words", "tone"),
    [
        ((1.0, 0.05), (0.4, 0.8), "the cones opened and the gap narrowed", "good"),
        ((1.0, 0.05), (0.0, 2.0), "the cones opened and the gap", "good"),
        ((0.4, 0.3), (3.0, 1.0), "the cones opened and the gap widened", "note"),
        ((0.0, 2.0), (1.0, 0.05), "the cones narrowed and the gap widened", "watch"),
    ],
)
def test_conclusion_about_what_changed(first, last, words, tone):
    verdict = judge(record(history=[kept(0, *_clouds(*first)), kept(50, *_clouds(*last))]))
    assert words in verdict.text
    assert verdict.tone == tone


def test_one_evaluation_shows_no_change():
    assert judge(record(history=[kept(0, *_clouds(1, 1))])).tone == "unknown"
