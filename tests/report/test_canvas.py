"""Drawings are SVG that fits a page, and are left out when there is nothing to draw."""

import xml.etree.ElementTree as ElementTree

import numpy as np

from dist_siglip.report.canvas import Curve, Series, draw_curves, thin


def _curve(*values, label=""):
    return Curve(label, Series(np.arange(len(values)) * 10, np.array(values, float)), "red")


def _texts(svg):
    return [e.text.strip() for e in ElementTree.fromstring(svg).iter("text") if e.text]


def _draw(*values, name="loss", **options):
    return draw_curves(name, "a drawing", [("loss", [_curve(*values)])], **options)


def test_curves_have_a_legend_and_axes_have_names():
    panels = [("above", [_curve(1, 2, label="a"), _curve(2, 1, label="b")]), ("below", [_curve(3)])]
    assert {"a", "b", "above", "below", "optimizer step"} <= set(
        _texts(draw_curves("two", "a drawing", panels))
    )


def test_axis_is_logarithmic_only_where_that_helps_and_is_allowed():
    # A linear axis labels its top "30"; a logarithmic one has powers of ten.
    allowed = {"may_be_logarithmic": ["loss"]}
    assert "30" not in _texts(_draw(30, 1, 0.1, **allowed))
    assert "30" in _texts(_draw(30, 1, 0.1))
    assert "30" in _texts(_draw(30, 1, 0.0, **allowed))
    assert "30" in _texts(_draw(30, 25, 20, **allowed))


def test_one_point_is_enough():
    assert _draw(1.0) is not None


def test_nothing_to_draw_gives_no_drawing():
    assert draw_curves("none", "a drawing", [("loss", []), ("bias", [])]) is None


def test_long_runs_are_thinned_and_keep_their_ends():
    steps, values = thin(Series(np.arange(200_000), np.arange(200_000.0)))
    assert len(steps) == len(values) == 1500
    assert (steps[0], steps[-1]) == (0, 199_999)


def test_names_with_dollars_and_underscores_are_shown_as_they_are():
    svg = draw_curves("names", "a drawing", [("loss", [_curve(1, 2, label="_$a$ <b>")])])
    assert "_$a$ <b>" in _texts(svg)


def test_colours_follow_the_page():
    svg = _draw(1, 2)
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_drawings_of_one_page_share_no_ids():
    ids = [
        {element.get("id") for element in ElementTree.fromstring(svg).iter()} - {None}
        for svg in (_draw(3, 2, 1), _draw(3, 2, 1, name="scale"))
    ]
    assert ids[0]
    assert ids[1]
    assert not ids[0] & ids[1]
