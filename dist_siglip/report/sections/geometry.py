"""Gap, spread and principal directions of both modalities, and their course over the run."""

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
from dist_siglip.report.measures import SPACE_MEASURES, known, table_of
from dist_siglip.report.page import (
    Section,
    Verdict,
    columns_of,
    judge_each,
    render_card,
    render_columns,
    render_figure,
    render_table_card,
)
from dist_siglip.report.records import RunRecord

_KINDS = ("images", "texts")
_FEW, _MANY = 0.1, 0.4  # of the dimensions, that hold 80 % of the variance
_SEPARABLE, _OVERLAPPING = 0.95, 0.65
_ONE_POINT = 0.95  # mean cosine within a modality
_FEW_DIRECTIONS = 0.05  # of the width of the embedding
# Heading, caption, upright axis, (label, key) of each curve.
_FIGURES: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Gap",
        "Distance of the centroids of images and texts (0 to 2); and the relative gap, which sets "
        "the distance of pairs against distances within a modality (0 to 1).",
        "gap",
        (("centroids", "val/modality_gap"), ("relative", "val/relative_modality_gap")),
    ),
    (
        "Margin",
        "Half the gap between positive and negative pairs: of the worst pair of each kind, and "
        "without the worst 5 %. Above 0 one threshold parts them.",
        "margin",
        (("5 % and 95 %", "val/margin_5_95"), ("worst pairs", "val/margin")),
    ),
    (
        "Spread",
        "Uniformity of each modality: 0 for one point, -4 for all over the sphere.",
        "uniformity",
        (("images", "val/image_uniformity"), ("texts", "val/text_uniformity")),
    ),
    (
        "Directions",
        "Effective rank: how many directions a modality spreads over.",
        "effective rank",
        (("images", "val/image_effective_rank"), ("texts", "val/text_effective_rank")),
    ),
)


def make_spectra(runs: Sequence[RunRecord]) -> Section:
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
    return Section("spectra", "Spectra", judge_each(runs, judge_spectra), [render_columns(figures)])


def judge_spectra(run: RunRecord) -> Verdict:
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


def make(runs: Sequence[RunRecord]) -> Section:
    """Draw gap, margin, spread and rank over steps, and list the newest numbers."""
    figures = []
    for heading, caption, label, quantities in _FIGURES:
        curves = [
            Curve(
                name if len(runs) == 1 else f"{run.short_name}, {name}",
                run.series[key],
                colour_of(place if len(runs) == 1 else index),
                STYLES[place],
                "s",
            )
            for index, run in enumerate(runs)
            for place, (name, key) in enumerate(quantities)
            if key in run.series
        ]
        drawing = draw_curves(
            f"geometry-{heading.lower()}", f"{heading} over steps", [(label, curves)]
        )
        missing = "No evaluation has logged it."
        figures.append(render_figure(heading, drawing, caption, missing=missing))
    table = table_of(runs, SPACE_MEASURES)
    if table:
        figures.append(render_card("At the newest evaluation", table))
    verdicts = judge_each(runs, judge_separation, judge_spread)
    return Section("geometry", "Geometry", verdicts, [render_columns(figures)])


def judge_separation(run: RunRecord) -> Verdict:
    """Say whether a plane parts images from texts, and why that is so."""
    found = known(run.metrics, "linear_separability", "modality_gap")
    if found is None:
        return Verdict("unknown", "The run has no evaluation of the modality gap.")
    separability, gap = found
    told = f"separability {separability:.3f}, centroids {gap:.2f} apart"
    if separability >= _SEPARABLE:
        return Verdict(
            "note",
            f"The modalities are linearly separable: {told}.",
            f"{_why_separable(run)} Retrieval across modalities does not suffer from it; mixing "
            "images and texts in one index does.",
        )
    if separability <= _OVERLAPPING:
        return Verdict(
            "good",
            f"Images and texts overlap: {told}.",
            "An image and a text can be compared with a third point as if they were of one kind.",
        )
    return Verdict(
        "note",
        f"The modalities are partly separable: {told}.",
        "A plane finds the modality of most points, not of all. Terms for alignment and "
        "uniformity close the gap further.",
    )


def judge_spread(run: RunRecord) -> Verdict | None:
    """Say so if a modality has shrunk to a point or to few directions; else how many it uses."""
    cosines = known(run.metrics, "image_cosine", "text_cosine")
    ranks = known(run.metrics, "image_effective_rank", "text_effective_rank")
    if ranks is None:
        return None
    told = f"effective rank {ranks[0]:.0f} of images and {ranks[1]:.0f} of texts"
    if cosines is not None and max(cosines) > _ONE_POINT:
        which = "images" if cosines[0] > cosines[1] else "texts"
        return Verdict(
            "bad",
            f"All {which} lie at nearly the same place (mean cosine {max(cosines):.3f}).",
            f"The space has collapsed, or has not begun to spread; {told}.",
        )
    width = None if run.features is None else run.features[0].shape[1]
    if width is not None and min(ranks) < max(1.5, _FEW_DIRECTIONS * width):
        return Verdict(
            "watch",
            f"The embeddings use few of their {width} directions: {told}.",
            "That limits how many pairs can be told apart; see the spectra and the capacity.",
        )
    of = "" if width is None else f" of {width} dimensions"
    return Verdict("good", f"Both modalities spread over many directions: {told}{of}.")


def _why_separable(run: RunRecord) -> str:
    bound = known(run.metrics, "margin", "relative_bias")
    if bound is not None and bound[0] > abs(bound[1]):
        return (
            f"With a margin of {bound[0]:.3f}, above the relative bias of {bound[1]:.3f} in size, "
            "this must be so (Bangachev et al. 2025, Theorem 3.6)."
        )
    plane = known(run.metrics, "images_on_their_side", "texts_on_their_side")
    sides = "" if plane is None else (
        f" The best plane through the origin has {100 * plane[0]:.1f} % of the images and "
        f"{100 * plane[1]:.1f} % of the texts on their side."
    )  # fmt: skip
    return (
        "This is expected, because the loss compares images with texts only: once each image is "
        "nearer to its own text than to the others, nothing pulls the two clouds together."
        f"{sides}"
    )
