"""Predicted and observed, against a loop over all pairs of all batches."""

import math

import numpy as np
import pytest

from dist_siglip.report.sections.pairs import judge_calibration, reliability
from tests.support.report_records import histograms, record

EDGES = np.linspace(-1, 1, 201)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2


def _cosines(num_pairs=12, seed=0):
    """A matrix of cosines, each at the centre of a bin, larger on the diagonal."""
    generator = np.random.default_rng(seed)
    bins = generator.integers(60, 120, (num_pairs, num_pairs))
    bins[np.diag_indices(num_pairs)] = generator.integers(130, 190, num_pairs)
    return CENTRES[bins]


def _run(cosines, is_match, batch, scale=8.0, bias=-4.0):
    return record(
        metrics={"logit_scale": scale, "logit_bias": bias, "gallery_pairs": len(cosines)},
        arrays=histograms(cosines[is_match], cosines[~is_match]),
        settings={"data.global_batch_size": batch},
    )


def _expected_by_loops(cosines, is_match, batch, scale, bias):
    """Matches an image meets in a random batch, and the sum of their probabilities.

    Own pair always, every other pair of its row with probability (N - 1) / (n - 1).
    """
    rows = len(cosines)
    meets = (batch - 1) / (rows - 1)
    matches = predicted = 0.0
    for i in range(rows):
        for j in range(rows):
            weight = (1.0 if i == j else meets) / rows
            matches += weight * is_match[i, j]
            predicted += weight / (1 + math.exp(-(scale * cosines[i, j] + bias)))
    return predicted, matches


@pytest.mark.parametrize("batch", [2, 12, 100])
def test_predicted_and_true_matches_are_those_of_a_random_batch(batch):
    cosines, own = _cosines(), np.eye(12, dtype=bool)
    found = reliability(_run(cosines, own, batch))
    predicted, matches = _expected_by_loops(cosines, own, batch, 8.0, -4.0)
    assert found.expected_matches == pytest.approx(predicted, rel=1e-12)
    assert found.true_matches == pytest.approx(matches, rel=1e-12)


def test_an_equal_caption_is_a_match_wherever_it_is_met():
    cosines, is_match = _cosines(), np.eye(12, dtype=bool)
    is_match[0, 1] = is_match[1, 0] = True
    found = reliability(_run(cosines, is_match, 6))
    assert found.true_matches == pytest.approx(
        _expected_by_loops(cosines, is_match, 6, 8.0, -4.0)[1], rel=1e-12
    )


def test_probabilities_that_are_right_lie_on_the_diagonal():
    """Counts drawn as the model says: of the pairs at p, a share p matches."""
    scale, bias, num_pairs = 10.0, 0.0, 1000
    chances = 1 / (1 + np.exp(-scale * CENTRES))
    total = np.full(200, 10_000)
    positive = np.round(total * chances).astype(int)
    arrays = {
        "histogram_edges": EDGES,
        "positive_histogram": positive,
        "negative_histogram": total - positive,
    }
    run = record(
        metrics={"logit_scale": scale, "logit_bias": bias, "gallery_pairs": num_pairs},
        arrays=arrays,
        settings={"data.global_batch_size": num_pairs},
    )
    found = reliability(run)
    assert np.allclose(found.predicted, found.observed, atol=0.002)
    assert judge_calibration(run).tone == "good"


def test_a_bias_that_is_too_high_is_found():
    cosines, own = _cosines(), np.eye(12, dtype=bool)
    verdict = judge_calibration(_run(cosines, own, 1000, bias=2.0))
    assert verdict.tone == "watch"
    assert "more matches than there are" in verdict.text
    assert "too high" in verdict.reason
    assert "fewer matches" in judge_calibration(_run(cosines, own, 12, bias=-15.0)).text


def test_a_scale_that_is_too_small_is_found():
    """At the right sum of probabilities, a larger scale would part the pairs better."""
    cosines, own = _cosines(), np.eye(12, dtype=bool)
    biases = np.linspace(-10, 0, 2001)
    sums = [_expected_by_loops(cosines, own, 12, 4.0, bias)[0] for bias in biases[::20]]
    bias = float(biases[::20][np.argmin(np.abs(np.array(sums) - 1))])
    verdict = judge_calibration(_run(cosines, own, 12, scale=4.0, bias=bias))
    assert verdict.tone == "note"
    assert "less sure" in verdict.text


@pytest.mark.parametrize("missing", ["logit_scale", "gallery_pairs"])
def test_without_its_numbers_nothing_is_said(missing):
    run = _run(_cosines(), np.eye(12, dtype=bool), 12)
    del run.metrics[missing]
    assert judge_calibration(run).tone == "unknown"


def test_without_a_global_batch_nothing_is_said():
    run = _run(_cosines(), np.eye(12, dtype=bool), "none")
    assert reliability(run) is None
