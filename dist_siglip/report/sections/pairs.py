"""Separation of positive from negative pairs, and the calibration of their probabilities.

Under the sigmoid loss the model says for each pair of a batch whether it belongs together. With N
pairs in a batch an image meets N - 1 others, so pairs of the evaluation count as often as they meet
in a batch of training size, not as often as they are in the gallery.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dist_siglip.errors import UserError
from dist_siglip.losses.calibration import Calibration, WeightedSimilarities, calibrate_scale_bias
from dist_siglip.report.canvas import (
    IMAGE_COLOUR,
    INK,
    TEXT_COLOUR,
    add_legend,
    colour_of,
    new_figure,
    new_small_figure,
    to_svg,
)
from dist_siglip.report.measures import MARGIN_MEASURES, known, show, table_of
from dist_siglip.report.page import (
    Section,
    Verdict,
    columns_of,
    judge_each,
    name_of,
    render_card,
    render_columns,
    render_figure,
    render_multiples,
    render_table_card,
)
from dist_siglip.report.records import RunRecord

_NUM_GROUPS = 12
_FEWEST = 1e-3  # expected pairs of a batch in a group, below which a point is left out
_TICKS = (1e-6, 1e-4, 0.01, 0.5, 0.99, 1 - 1e-4, 1 - 1e-6)
_MANY, _FEW = 1.25, 0.8  # predicted over true matches
_UNSURE = "less sure of its answers than it could be"
_BETTER = 0.9  # of the loss, below which another scale and bias are worth having
_BARS = 60
_POSITIVE, _NEGATIVE = IMAGE_COLOUR, TEXT_COLOUR
_NO_EVALUATION = "No evaluation with arrays is in this run folder; validate the run first."


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


def make_calibration(runs: Sequence[RunRecord]) -> Section:
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
    return Section("calibration", "Calibration", judge_each(runs, judge_calibration), parts)


def judge_calibration(run: RunRecord) -> Verdict:
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


def make(runs: Sequence[RunRecord]) -> Section:
    """Draw histograms of both kinds of pairs, now and at several steps."""
    figures = []
    for index, run in enumerate(runs):
        heading = "Positive and negative pairs" + name_of(run, runs)
        scale, bias = (run.metrics.get(name) for name in ("logit_scale", "logit_bias"))
        figures.append(
            render_figure(
                heading,
                draw_logits(run.arrays, scale, bias, name=f"logits-{index}"),
                "Share of all validation pairs of each kind, on a logarithmic axis. Above logit 0 "
                "the model says match.",
                missing=_NO_EVALUATION,
            )
        )
    table = table_of(runs, MARGIN_MEASURES)
    if table:
        figures.append(render_card("How far apart", table))
    parts = [render_columns(figures)]
    for index, run in enumerate(runs):
        if len(run.history) > 1:
            heading = "Cosines over the run" + name_of(run, runs)
            panels = [
                (
                    f"step {kept.step:,}",
                    draw_cosines(vars(kept), name=f"cosines-{index}-{kept.step}"),
                )
                for kept in run.history
            ]
            parts.append(
                render_multiples(
                    heading,
                    panels,
                    "Cosine from -1 to 1. Filled: pairs that belong together; line: all others.",
                )
            )
    return Section("pairs", "Pairs that belong together", judge_each(runs, judge), parts)


def judge(run: RunRecord) -> Verdict:
    """Say whether a threshold parts positive from negative pairs, and how nearly."""
    margins = known(run.metrics, "margin", "margin_5_95", "relative_bias_5_95")
    if margins is None:
        return Verdict("unknown", "The run has no evaluation with margins.")
    margin, lenient, bias = margins
    order = probability_of_order(run.arrays)
    told = "" if order is None else (
        f" A positive pair is more similar than a negative one with probability {order:.4f}."
    )  # fmt: skip
    if margin > 0:
        return Verdict(
            "good",
            f"One threshold parts all positive from all negative pairs (margin {margin:.3f}).",
            "With such a margin the nearest caption is always the right one, and a loss of zero "
            f"can be reached by a larger scale.{told}",
        )
    if lenient > 0:
        return Verdict(
            "note",
            "A threshold parts positive from negative pairs, but for the worst of each kind.",
            f"Without the worst 5 % the margin is {lenient:.3f} around a cosine of {bias:.2f}; "
            f"with them it is {margin:.3f}. A few bad pairs suffice for that.{told}",
        )
    return Verdict(
        "watch",
        "No threshold parts positive from negative pairs.",
        f"Even without the worst 5 % of each kind the margin is {lenient:.3f}, below 0. Retrieval "
        f"may still be good, since it compares within a row only.{told}",
    )


def probability_of_order(arrays: Mapping[str, np.ndarray]) -> float | None:
    """Probability that a positive pair has a larger cosine than a negative one; ties count half.

    Example:
        >>> bins = {"positive_histogram": np.array([0, 1]), "negative_histogram": np.array([1, 1])}
        >>> probability_of_order(bins)
        0.75
    """
    positive, negative = (arrays.get(f"{kind}_histogram") for kind in ("positive", "negative"))
    if positive is None or negative is None or positive.shape != negative.shape:
        return None
    total = float(positive.sum()) * float(negative.sum())
    if not total:
        return None
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / total)


def draw_logits(
    arrays: Mapping[str, np.ndarray],
    logit_scale: float | None,
    logit_bias: float | None,
    *,
    name: str = "logits",
) -> str | None:
    """Share of positive and negative pairs by logit, or by cosine if scale or bias is unknown."""
    edges, counts = _coarse_histograms(arrays)
    if edges is None:
        return None
    label = "cosine"
    if logit_scale is not None and logit_bias is not None:
        edges, label = logit_scale * edges + logit_bias, "logit"
    figure, (axes,) = new_figure(1, 2.9)
    for kind, colour, style in (("negative", _NEGATIVE, "--"), ("positive", _POSITIVE, "-")):
        share = counts[kind] / max(1, counts[kind].sum())
        axes.stairs(share, edges, color=colour, linestyle=style, linewidth=1.4, label=kind)
        axes.stairs(share, edges, color=colour, alpha=0.15, fill=True)
    axes.set_yscale("log")
    if label == "logit":
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.set_xlabel(label)
    axes.set_ylabel("share of pairs")
    add_legend(axes)
    return to_svg(figure, name, f"Positive and negative pairs by {label}, logarithmic")


def draw_cosines(arrays: Mapping[str, np.ndarray], *, name: str) -> str:
    """A small drawing of both kinds of pairs by cosine, on fixed axes."""
    figure, axes = new_small_figure(1.3)
    edges = arrays["histogram_edges"]
    # Bars of 0.04: as many as a small drawing can show.
    merged = max(1, (len(edges) - 1) // 50)
    starts = np.arange(0, len(edges) - 1, merged)
    for kind, colour, is_filled in (("positive", _POSITIVE, True), ("negative", _NEGATIVE, False)):
        counts = np.add.reduceat(arrays[f"{kind}_histogram"], starts)
        share = counts / max(1, counts.max())
        axes.stairs(
            share,
            np.append(edges[starts], edges[-1]),
            color=colour,
            fill=is_filled,
            alpha=0.55 if is_filled else 1,
            linewidth=1.1,
        )
    axes.set_xlim(-1, 1)
    axes.set_ylim(0, 1.05)
    axes.set_xticks([-1, 0, 1])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    return to_svg(figure, name, "Positive and negative pairs by cosine")


def _coarse_histograms(
    arrays: Mapping[str, np.ndarray],
) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
    """Cut the fine histograms to where pairs are, and merge bins to about 60 bars."""
    edges = arrays.get("histogram_edges")
    fine = {kind: arrays.get(f"{kind}_histogram") for kind in ("positive", "negative")}
    present = {kind: bins for kind, bins in fine.items() if bins is not None}
    if edges is None or len(present) < 2:
        return None, {}
    if any(bins.shape != (len(edges) - 1,) for bins in present.values()):
        return None, {}
    occupied = np.flatnonzero(present["positive"] + present["negative"])
    if not len(occupied):
        return None, {}
    first, last = int(occupied[0]), int(occupied[-1]) + 1
    step = max(1, -(-(last - first) // _BARS))
    starts = np.arange(first, last, step)
    ends = np.append(starts[1:], min(int(starts[-1]) + step, len(edges) - 1))
    coarse = {
        kind: np.array([bins[a:b].sum() for a, b in zip(starts, ends, strict=True)])
        for kind, bins in present.items()
    }
    return np.append(edges[starts], edges[ends[-1]]), coarse
