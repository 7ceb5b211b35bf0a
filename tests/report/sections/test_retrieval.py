"""Recall against chance, one direction against the other, and items that nobody finds."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dist_siglip.report.page import render_section
from dist_siglip.report.records import Picture
from dist_siglip.report.sections.retrieval import (
    draw_recall,
    judge,
    judge_directions,
    judge_hubs,
    make,
)
from tests.support.report_records import record


def _run(forward, backward=None, pairs=1000.0):
    return record(
        metrics={
            "image_to_text_recall@1": forward,
            "text_to_image_recall@1": forward if backward is None else backward,
            "gallery_pairs": pairs,
            "distinct_captions": pairs,
        }
    )


@pytest.mark.parametrize(
    ("recall", "tone"), [(0.001, "bad"), (0.004, "bad"), (0.1, "note"), (0.6, "good")]
)
def test_conclusion_sets_recall_against_chance(recall, tone):
    assert judge(_run(recall)).tone == tone


def test_conclusion_says_how_well_recall_is_known():
    # Two standard errors of a share of 0.5 among 1000.
    assert "known to ±0.032" in judge(_run(0.5)).reason


def test_directions_are_told_apart_only_beyond_noise():
    assert judge_directions(_run(0.50, 0.53)) is None
    assert "text to image" in judge_directions(_run(0.50, 0.70)).text
    assert judge_directions(_run(0.4, 0.7, pairs=10)) is None


def test_many_orphans_are_told():
    few = {"image_to_text_orphans": 0.1, "text_to_image_orphans": 0.0}
    assert judge_hubs(record(metrics=few)) is None
    many = few | {"text_to_image_orphans": 0.4}
    assert "40 % of the images" in judge_hubs(record(metrics=many)).text


def test_recall_is_drawn_for_both_directions():
    ranks = {f"{name}_ranks": np.array([1, 2, 9]) for name in ("image_to_text", "text_to_image")}
    svg = draw_recall([record(arrays=ranks)])
    texts = {e.text.strip() for e in ElementTree.fromstring(svg).iter("text") if e.text}
    assert {"image to text", "text to image", "answers looked at"} <= texts
    assert draw_recall([record()]) is None


def test_gallery_begins_with_the_worst_mistakes():
    """Pictures whose own caption is second come before those whose own is first."""
    features = np.eye(3)
    images = np.array([[1.0, 0, 0], [0.2, 0.5, 0.9], [0, 0.7, 0.6]])
    run = record(
        arrays={"image_features": images, "text_features": features},
        captions=["one", "two", "three"],
        pictures=[Picture(row, "data:,") for row in range(3)],
    )
    page = render_section("", *make([run]).parts)
    headings = [part.partition("</h4>")[0] for part in page.split("<h4>")[1:]]
    assert headings == ["two", "three", "one"]
    assert "1 of these 3 images have their own caption first" in page
