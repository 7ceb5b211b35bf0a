"""Gap, margin, spread and directions of both modalities, and their course over the run."""

from collections.abc import Sequence

from dist_siglip.report.canvas import STYLES, Curve, colour_of, draw_curves
from dist_siglip.report.measures import SPACE_MEASURES, known, table_of
from dist_siglip.report.page import (
    Section,
    Verdict,
    judge_each,
    render_card,
    render_columns,
    render_figure,
)
from dist_siglip.report.records import RunRecord

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
