"""Separation of positive from negative pairs, and its course over the run."""

from collections.abc import Mapping, Sequence

import numpy as np

from dist_siglip.report.canvas import INK, add_legend, new_figure, new_small_figure, to_svg
from dist_siglip.report.measures import MARGIN_MEASURES, known, table_of
from dist_siglip.report.page import (
    Section,
    Verdict,
    judge_each,
    name_of,
    render_card,
    render_columns,
    render_figure,
    render_multiples,
)
from dist_siglip.report.records import RunRecord

_BARS = 60
_POSITIVE, _NEGATIVE = "#3987d1", "#d9782d"
_NO_EVALUATION = "No evaluation with arrays is in this run folder; validate the run first."


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
