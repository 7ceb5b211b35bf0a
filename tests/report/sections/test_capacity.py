"""What the bounds say about a run; the bounds themselves are tested with the metrics."""

import numpy as np
import pytest

from dist_siglip.metrics.capacity import largest_pairs, required_dimension
from dist_siglip.report.sections.capacity import (
    compare_prefixes,
    judge,
    judge_prefixes,
    make,
    room,
)
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


def _measured(name, trained=None, **recalls):
    metrics = {"image_to_text_recall@1": 0.8, "text_to_image_recall@1": 0.6}
    metrics |= {"margin_5_95": 0.2, "modality_gap": 0.5}
    for key, recall in recalls.items():
        metrics |= {
            f"{key}_image_to_text_recall@1": recall,
            f"{key}_text_to_image_recall@1": recall,
        }
        metrics |= {f"{key}_margin": 0.1, f"{key}_margin_5_95": 0.15, f"{key}_modality_gap": 0.4}
    settings = {}
    if trained:
        settings["model.loss.class_path"] = "dist_siglip.losses.MatryoshkaLoss"
        settings["model.loss.init_args.dims"] = trained
    return record(name, metrics=metrics, settings=settings)


def test_fewer_dimensions_are_compared_cut_rotated_and_trained():
    plain = _measured("plain", prefix_64=0.4, pca_64=0.69, prefix_8=0.1, pca_8=0.3)
    nested = _measured("nested", trained=[64], prefix_64=0.7, pca_64=0.71, prefix_8=0.2, pca_8=0.2)
    page = "".join(make([plain, nested]).parts)
    for heading in ("plain: plain cut", "plain: PCA", "nested: Matryoshka", "nested: PCA"):
        assert heading in page
    assert "<td>64</td><td>0.400<small>margin 0.150, gap 0.400</small></td><td>0.690" in page
    assert "gap 0.400 (not trained)" in page  # the 8 of the second run
    verdict = judge_prefixes(nested)
    assert "cut: 64, rotated by PCA: 64" in verdict.text
    assert "Trained at prefixes 64" in verdict.reason
    assert "cut: none of these, rotated by PCA: 64" in judge_prefixes(plain).text


def _pair(plain_pca, trained, pairs=500, **more):
    plain = _measured("plain", prefix_8=0.1, pca_8=plain_pca)
    nested = _measured("nested", trained=[64, 8], prefix_8=trained, pca_8=0.3)
    for run in (plain, nested):
        run.metrics.update(gallery_pairs=pairs, step=600)
    nested.metrics.update(more)
    return plain, nested


@pytest.mark.parametrize(
    ("pca", "trained", "tone"), [(0.3, 0.5, "good"), (0.5, 0.52, "note"), (0.5, 0.3, "watch")]
)
def test_cut_rotation_and_training_at_prefixes_have_one_conclusion(pca, trained, tone):
    plain, nested = _pair(pca, trained)
    run, verdict = compare_prefixes([plain, nested])
    assert (run, verdict.tone) == (nested, tone)
    assert f"plain cut 0.100, rotated by PCA {pca:.3f}, whole 0.700" in verdict.reason
    assert (run, verdict) in make([plain, nested]).verdicts
    error = float(verdict.reason.partition("difference ")[2][:5])
    assert error == pytest.approx(
        ((pca * (1 - pca) + trained * (1 - trained)) / 500) ** 0.5, abs=6e-4
    )


def test_prefixes_of_runs_that_do_not_compare_are_not_compared():
    for more, told in (({"gallery_pairs": 400}, "numbers of pairs"), ({"step": 90}, "steps of")):
        verdict = compare_prefixes(_pair(0.3, 0.5, **more))[1]
        assert verdict.tone == "watch"
        assert told in verdict.reason
    plain, nested = _pair(0.3, 0.5)
    unmeasured = _measured("plain")
    unmeasured.metrics["gallery_pairs"] = 500
    verdict = compare_prefixes([unmeasured, nested])[1]
    assert (verdict.tone, "model.prefix_dims: [64, 8]" in verdict.reason) == ("unknown", True)
    assert compare_prefixes([plain]) is None
    assert compare_prefixes([nested, nested]) is None


def test_runs_without_measured_prefixes_have_no_such_table():
    run = _run(0.1, 0.1, 64)
    assert judge_prefixes(run) is None
    assert "fewer dimensions" not in "".join(make([run]).parts)
