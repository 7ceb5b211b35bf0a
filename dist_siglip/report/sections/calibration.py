"""Predicted probability of a match against the observed share of matches.

Under the sigmoid loss the model says for each pair of a batch whether it belongs together. With N
pairs in a batch an image meets N - 1 others, so pairs of the evaluation count as often as they meet
in a batch of training size, not as often as they are in the gallery.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dist_siglip.errors import UserError
from dist_siglip.losses.calibration import Calibration, WeightedSimilarities, calibrate_scale_bias
from dist_siglip.report.canvas import INK, add_legend, colour_of, new_figure, to_svg
from dist_siglip.report.measures import show
from dist_siglip.report.page import (
    Section,
    Verdict,
    columns_of,
    judge_each,
    render_columns,
    render_figure,
    render_table_card,
)
from dist_siglip.report.records import RunRecord

_NUM_GROUPS = 12
_FEWEST = 1e-3  # expected pairs of a batch in a group, below which a point is left out
_TICKS = (1e-6, 1e-4, 0.01, 0.5, 0.99, 1 - 1e-4, 1 - 1e-6)
_MANY, _FEW = 1.25, 0.8  # predicted over true matches
_UNSURE = "less sure of its answers than it could be"
_BETTER = 0.9  # of the loss, below which another scale and bias are worth having


class Reliability(NamedTuple):
    """What the model says of pairs, and what is so, in a batch of training size.

    Attributes:
        predicted: (G,) mean probability of each group of pairs.
        observed: (G,) share of matches in it.
        expected_matches: sum of probabilities an image meets in a batch.
        true_matches: matches it meets.
        global_batch_size: pairs of the batch.
        fitted: scale and bias that would have the lowest loss; None if they cannot be fitted.
    """

    predicted: np.ndarray
    observed: np.ndarray
    expected_matches: float
    true_matches: float
    global_batch_size: int
    fitted: Calibration | None


def make(runs: Sequence[RunRecord]) -> Section:
    """Draw predicted against observed, and compare scale and bias with the best ones."""
    found = [reliability(run) for run in runs]
    figure = render_figure(
        "Reliability",
        draw_reliability(runs, found),
        "Pairs grouped by what the model says; on the diagonal it is right. Below it the model is "
        "too sure of a match, above it not sure enough; at the lower edge none match. Both axes "
        "show log-odds.",
        missing="Histograms, scale, bias or global batch are not in this run folder.",
    )
    rows = []
    for label, get in (
        ("global batch\nin which pairs are judged", lambda r: show(r.global_batch_size, "{:,.0f}")),
        ("matches of an image in it", lambda r: show(r.true_matches)),
        ("matches the model predicts\nsum of probabilities", lambda r: show(r.expected_matches)),
        ("best scale and bias", lambda r: _pair(r.fitted)),
        ("loss with these\nnow, with the best", lambda r: _losses(r.fitted)),
    ):
        rows.append([label, *("n/a" if each is None else get(each) for each in found)])
    parts = [render_columns([figure, render_table_card("In numbers", columns_of(runs), rows)])]
    return Section("calibration", "Calibration", judge_each(runs, judge), parts)


def judge(run: RunRecord) -> Verdict:
    """Compare predicted and true matches, and the loss with the lowest there is."""
    found = reliability(run)
    if found is None:
        return Verdict(
            "unknown",
            "The probabilities cannot be judged.",
            "That needs an evaluation, scale, bias, and the global batch of config.yaml.",
        )
    ratio = found.expected_matches / found.true_matches
    told = (
        f"In a batch of {found.global_batch_size:,} pairs it predicts "
        f"{found.expected_matches:.2f} matches for each image, where there are "
        f"{found.true_matches:.2f}."
    )
    if ratio > _MANY or ratio < _FEW:
        much = "more" if ratio > 1 else "fewer"
        way = "high" if ratio > 1 else "low"
        return Verdict(
            "watch",
            f"The model predicts {much} matches than there are ({ratio:.2f} times).",
            f"{told} Its bias is too {way} for these pairs; retrieval does not depend on it, "
            "thresholds do. `dist-siglip calibrate` fits scale and bias.",
        )
    fitted = found.fitted
    if fitted is not None and fitted.loss_after < _BETTER * fitted.loss_before:
        now = run.metrics["logit_scale"]
        is_too_sure = fitted.scale < now
        return Verdict(
            "watch" if is_too_sure else "note",
            f"The model is {'surer than it should be' if is_too_sure else _UNSURE}.",
            f"With scale {fitted.scale:.1f} in place of {now:.1f} the validation loss would be "
            f"{fitted.loss_after:.3g}, not {fitted.loss_before:.3g}. {told}",
        )
    return Verdict("good", "The probabilities can be taken at their word.", told)


def reliability(run: RunRecord) -> Reliability | None:
    """Group the pairs of the newest evaluation by their probability; None if something is missing.

    A pair with equal captions is a match. Each negative counts (N - 1) / (n - 1) times for n pairs
    in the gallery, so that an image meets as many as in a batch of N; of several equal captions one
    is the image's own and the others count like negatives.
    """
    edges = run.arrays.get("histogram_edges")
    counts = [run.arrays.get(f"{kind}_histogram") for kind in ("positive", "negative")]
    scale, bias = (run.metrics.get(name) for name in ("logit_scale", "logit_bias"))
    num_pairs = run.metrics.get("gallery_pairs", 0.0)
    batch = run.settings.get("data.global_batch_size")
    if edges is None or scale is None or bias is None or not isinstance(batch, int):
        return None
    positive, negative = counts
    if positive is None or negative is None or positive.shape != negative.shape:
        return None
    if batch < 2 or num_pairs < 2 or len(edges) != len(positive) + 1 or not positive.sum():
        return None
    meets = (batch - 1) / (num_pairs - 1)
    true_matches = 1 + (positive.sum() / num_pairs - 1) * meets
    positive_weight = positive * true_matches / positive.sum()
    negative_weight = negative * meets / num_pairs
    cosines = (edges[:-1] + edges[1:]) / 2
    logits = scale * cosines + bias
    probabilities = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    weight = positive_weight + negative_weight
    predicted, observed = _group(logits, probabilities, positive_weight, weight)
    return Reliability(
        predicted,
        observed,
        float((weight * probabilities).sum()),
        float(true_matches),
        batch,
        _fit(cosines, positive_weight, negative_weight, batch, scale, bias),
    )


def draw_reliability(runs: Sequence[RunRecord], found: Sequence[Reliability | None]) -> str | None:
    """Draw observed against predicted shares of matches; None if no run has any."""
    shown = [(i, run, each) for i, (run, each) in enumerate(zip(runs, found, strict=True)) if each]
    shown = [(i, run, each) for i, run, each in shown if len(each.predicted)]
    if not shown:
        return None
    figure, (axes,) = new_figure(1, 3.4)
    ends = np.array([_log_odds(_TICKS[0]), _log_odds(_TICKS[-1])])
    axes.plot(ends, ends, ":", color=INK, linewidth=1, label="right")
    for index, run, each in shown:
        axes.plot(
            np.clip(_log_odds(each.predicted), *ends),
            np.clip(_log_odds(each.observed), *ends),
            "o-",
            color=colour_of(index),
            markersize=4,
            linewidth=1.2,
            label=" " + (run.short_name if len(runs) > 1 else "this run"),
        )
    labels = ["1e-6", "1e-4", "0.01", "0.5", "0.99", "1-1e-4", "1-1e-6"]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([float(_log_odds(tick)) for tick in _TICKS], labels)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("probability the model gives")
    axes.set_ylabel("share that match")
    add_legend(axes)
    return to_svg(figure, "reliability", "Predicted probability against observed share of matches")


def _group(
    logits: np.ndarray, probabilities: np.ndarray, matches: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean probability and share of matches in groups of equal width in the logit."""
    occupied = np.flatnonzero(weight)
    low, high = logits[occupied[0]], logits[occupied[-1]]
    width = max((high - low) / _NUM_GROUPS, 1e-9)
    group = np.clip(((logits - low) / width).astype(int), 0, _NUM_GROUPS - 1)
    sums = [
        np.bincount(group[occupied], values[occupied], minlength=_NUM_GROUPS)
        for values in (weight, weight * probabilities, matches)
    ]
    kept = sums[0] >= _FEWEST
    return sums[1][kept] / sums[0][kept], sums[2][kept] / sums[0][kept]


def _fit(
    cosines: np.ndarray,
    positive: np.ndarray,
    negative: np.ndarray,
    batch: int,
    scale: float,
    bias: float,
) -> Calibration | None:
    sides = [
        WeightedSimilarities(
            torch.from_numpy(cosines[weights > 0]), torch.from_numpy(weights[weights > 0])
        )
        for weights in (positive, negative)
    ]
    try:
        return calibrate_scale_bias(sides[0], sides[1], batch, scale_before=scale, bias_before=bias)
    except UserError:
        return None


def _log_odds(share: np.ndarray | float) -> np.ndarray:
    clipped = np.clip(share, 1e-9, 1 - 1e-9)
    odds: np.ndarray = np.log(clipped) - np.log1p(-clipped)
    return odds


def _pair(fitted: Calibration | None) -> str:
    return "n/a" if fitted is None else f"{fitted.scale:.1f}, {fitted.bias:.1f}"


def _losses(fitted: Calibration | None) -> str:
    return "n/a" if fitted is None else f"{fitted.loss_before:.3g}, {fitted.loss_after:.3g}"
