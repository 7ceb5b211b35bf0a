"""Variance over principal axes: the directions the embeddings use."""

from collections.abc import Sequence

import numpy as np

from dist_siglip.report.canvas import (
    STYLES,
    Curve,
    Series,
    add_legend,
    colour_of,
    draw_curves,
    new_figure,
    to_svg,
)
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

_KINDS = ("images", "texts")
_FEW, _MANY = 0.1, 0.4  # of the dimensions, that hold 80 % of the variance


def make(runs: Sequence[RunRecord]) -> Section:
    """Draw how variance spreads over principal axes, now and over steps."""
    found = [spectra(run) for run in runs]
    rows = []
    for place, kind in enumerate(_KINDS):
        for share in (0.8, 0.9):
            cells = [
                "n/a" if each is None else f"{components(each[place], share)} of {len(each[place])}"
                for each in found
            ]
            rows.append([f"{kind}: axes for {100 * share:.0f} % of the variance", *cells])
    figures = [
        render_figure(
            "Variance by principal axis",
            draw_spectra(runs, found),
            "Share of the variance of each modality within the first axes. The further to the "
            "right a curve rises, the more directions are used.",
            missing="No evaluation with arrays is in this run folder; validate the run first.",
        ),
        render_figure(
            "Axes in use, over the run",
            _draw_use(runs),
            "Axes that hold 80 % of the variance of the same few pairs at each step.",
            missing="No evaluation of an earlier step is kept.",
        ),
    ]
    if any(each is not None for each in found):
        figures.append(render_table_card("In numbers", columns_of(runs), rows))
    return Section("spectra", "Spectra", judge_each(runs, judge), [render_columns(figures)])


def judge(run: RunRecord) -> Verdict:
    """Say what part of the dimensions holds most of the variance."""
    found = spectra(run)
    if found is None:
        return Verdict("unknown", "The run has no evaluation with features.")
    width = len(found[0])
    needed = [components(each, 0.8) for each in found]
    told = (
        f"80 % of the variance lies in {needed[0]} axes of the images and {needed[1]} of the "
        f"texts, of {width}"
    )
    if min(needed) < _FEW * width:
        return Verdict(
            "watch",
            "A small part of the dimensions does most of the work.",
            f"{told}. Early in training that is usual; at the end a smaller embedding might do as "
            "well, or a term for uniformity might use what is there.",
        )
    tone, text = ("good", "The dimensions are well used.") if min(needed) >= _MANY * width else (
        "note", "A part of the dimensions does most of the work."
    )  # fmt: skip
    return Verdict("good" if tone == "good" else "note", text, f"{told}.")


def spectra(run: RunRecord) -> tuple[np.ndarray, np.ndarray] | None:
    """Variance ratios of images and of texts in the newest evaluation; None without any.

    Those of all its pairs, if it has written them; else those of the pairs it has kept.
    """
    written = [run.arrays.get(f"{kind}_explained_variance") for kind in ("image", "text")]
    usable = [each for each in written if each is not None and each.ndim == 1 and each.sum() > 0]
    if len(usable) == 2:
        return usable[0], usable[1]
    if run.features is None:
        return None
    images, texts = (variance_ratios(each) for each in run.features)
    return None if images is None or texts is None else (images, texts)


def variance_ratios(features: np.ndarray) -> np.ndarray | None:
    """Share of the variance along each principal axis, largest first, (D,); None without any.

    Example:
        >>> variance_ratios(np.array([[2.0, 0], [-2, 0], [0, 1], [0, -1]])).round(2).tolist()
        [0.8, 0.2]
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    squares = np.linalg.eigvalsh(centred.T @ centred)[::-1].clip(min=0)
    total = float(squares.sum())
    if total <= 1e-12 * len(features):
        return None
    ratios: np.ndarray = squares / total
    return ratios


def components(ratios: np.ndarray, share: float) -> int:
    """Fewest principal axes that hold ``share`` of the variance.

    Example:
        >>> components(np.array([0.5, 0.25, 0.25]), 0.75), components(np.array([0.9, 0.1]), 0.5)
        (2, 1)
    """
    return int(np.searchsorted(np.cumsum(ratios), share - 1e-9)) + 1


def draw_spectra(
    runs: Sequence[RunRecord], found: Sequence[tuple[np.ndarray, np.ndarray] | None]
) -> str | None:
    """Cumulative share of the variance over principal axes; None without any."""
    if all(each is None for each in found):
        return None
    figure, (axes,) = new_figure(1, 2.9)
    for index, (run, each) in enumerate(zip(runs, found, strict=True)):
        for place, (kind, ratios) in enumerate(zip(_KINDS, each or (), strict=bool(each))):
            axes.plot(
                np.arange(1, len(ratios) + 1),
                100 * np.cumsum(ratios),
                color=colour_of(place if len(runs) == 1 else index),
                linestyle=STYLES[place],
                linewidth=1.6,
                label=f" {kind}" if len(runs) == 1 else f" {run.short_name}, {kind}",
            )
    axes.set_xlabel("principal axes")
    axes.set_ylabel("% of the variance")
    axes.set_ylim(0, 102)
    add_legend(axes)
    return to_svg(figure, "spectra", "Cumulative variance over principal axes")


def _draw_use(runs: Sequence[RunRecord]) -> str | None:
    curves = []
    for index, run in enumerate(runs):
        for place, kind in enumerate(_KINDS):
            points = []
            for kept in run.history:
                ratios = variance_ratios((kept.image_features, kept.text_features)[place])
                if ratios is not None:
                    points.append((kept.step, components(ratios, 0.8)))
            if points:
                steps, needed = np.array(points).T
                label = kind if len(runs) == 1 else f"{run.short_name}, {kind}"
                colour = colour_of(place if len(runs) == 1 else index)
                curves.append(
                    Curve(label, Series(steps, needed.astype(float)), colour, STYLES[place], "s")
                )
    return draw_curves("use", "Axes for 80 % of the variance over steps", [("axes", curves)])
