"""Variance by principal axis, and how many axes do the work."""

import numpy as np
import pytest

from dist_siglip.report.sections.geometry import components, judge_spectra, spectra, variance_ratios
from tests.support.report_records import record


def _run(used, width=20):
    """Features that vary alike in ``used`` of their dimensions."""
    features = np.concatenate([np.eye(width)[:used], -np.eye(width)[:used]])
    return record(arrays={"image_features": features, "text_features": features + 0.5})


def test_ratios_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    features = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7)
    expected = PCA(svd_solver="full").fit(features).explained_variance_ratio_
    assert np.allclose(variance_ratios(features), expected, atol=1e-12)


def test_one_point_has_no_spectrum():
    assert variance_ratios(np.ones((10, 4))) is None


def test_components_are_the_fewest_that_suffice():
    ratios = np.array([0.5, 0.3, 0.2])
    assert [components(ratios, share) for share in (0.5, 0.51, 0.8, 0.9, 1.0)] == [1, 2, 2, 3, 3]


@pytest.mark.parametrize(("used", "tone"), [(1, "watch"), (6, "note"), (20, "good")])
def test_conclusion_about_the_dimensions_in_use(used, tone):
    assert judge_spectra(_run(used)).tone == tone


def test_spectra_of_all_pairs_come_before_those_of_the_kept_ones():
    run = _run(5)
    assert spectra(run)[0][0] == pytest.approx(0.2)
    written = np.array([0.75, 0.25])
    run.arrays.update(image_explained_variance=written, text_explained_variance=written)
    assert spectra(run)[0][0] == 0.75


def test_without_features_nothing_is_said():
    assert judge_spectra(record()).tone == "unknown"
