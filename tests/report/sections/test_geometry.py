"""Why the modalities are separable, and whether a modality has collapsed."""

import numpy as np
import pytest

from dist_siglip.report.sections.geometry import judge_separation, judge_spread
from tests.support.report_records import record


def _separation(separability, **metrics):
    named = {"linear_separability": separability, "modality_gap": 0.5}
    return judge_separation(record(metrics=named | metrics))


@pytest.mark.parametrize(
    ("separability", "words"),
    [(1.0, "are linearly separable"), (0.8, "partly separable"), (0.55, "overlap")],
)
def test_conclusion_about_separability(separability, words):
    assert words in _separation(separability).text


def test_separability_is_expected_because_of_the_loss():
    assert "expected, because the loss compares images with texts" in _separation(1.0).reason


def test_theorem_is_named_only_where_it_holds():
    """Its condition is a margin above the size of the relative bias."""
    assert "must be so" in _separation(1.0, margin=0.3, relative_bias=-0.1).reason
    assert "must be so" not in _separation(1.0, margin=0.3, relative_bias=0.4).reason
    assert "must be so" not in _separation(1.0, margin=-0.3, relative_bias=0.1).reason


def test_sides_of_the_plane_are_told():
    told = _separation(1.0, images_on_their_side=1.0, texts_on_their_side=0.975).reason
    assert "100.0 % of the images and 97.5 % of the texts" in told


@pytest.mark.parametrize(
    ("cosine", "rank", "tone"), [(0.99, 20, "bad"), (0.2, 2, "watch"), (0.2, 20, "good")]
)
def test_conclusion_about_spread(cosine, rank, tone):
    features = np.eye(64)
    run = record(
        metrics={
            "image_cosine": cosine,
            "text_cosine": 0.1,
            "image_effective_rank": 40,
            "text_effective_rank": rank,
        },
        arrays={"image_features": features, "text_features": features},
    )
    assert judge_spread(run).tone == tone


def test_without_numbers_nothing_is_said():
    assert judge_separation(record()).tone == "unknown"
    assert judge_spread(record()) is None
