"""Names, meanings and formats of the numbers of an evaluation."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dist_siglip.report.page import columns_of, render_table
from dist_siglip.report.records import RunRecord


class Measure(NamedTuple):
    """A number of an evaluation."""

    key: str
    label: str
    meaning: str


DIRECTIONS = (("image to text", "image_to_text"), ("text to image", "text_to_image"))
MODEL_MEASURES = (
    Measure("loss", "validation loss", "of a random training batch of these pairs"),
    Measure("logit_scale", "logit scale", "multiplier of the cosine"),
    Measure("logit_bias", "logit bias", "added to the scaled cosine"),
    Measure("learned_relative_bias", "learned relative bias", "cosine above which it says match"),
)
SPACE_MEASURES = (
    Measure("modality_gap", "modality gap", "distance of the two centroids, 0 to 2"),
    Measure("relative_modality_gap", "relative modality gap", "0: together, 1: far apart"),
    Measure("linear_separability", "linear separability", "0.5: overlap, 1: a plane parts them"),
    Measure("alignment", "alignment", "mean squared distance of a pair, 0 is perfect"),
    Measure("image_uniformity", "image uniformity", "0: one point, -4: all over the sphere"),
    Measure("text_uniformity", "text uniformity", "0: one point, -4: all over the sphere"),
    Measure(
        "cross_uniformity", "cross-uniformity", "of an image and another's text; the same scale"
    ),
    Measure("image_cosine", "image cone", "mean cosine of two images; 1: one point"),
    Measure("text_cosine", "text cone", "mean cosine of two texts; 1: one point"),
    Measure("image_effective_rank", "image effective rank", "directions the images spread over"),
    Measure("text_effective_rank", "text effective rank", "directions the texts spread over"),
    Measure("images_on_their_side", "images on their side", "of the best plane through the origin"),
    Measure("texts_on_their_side", "texts on their side", "of the same plane"),
)
HUB_MEASURES = (
    Measure("image_to_text_hubness", "hubness of texts", "skewness of how often each is found"),
    Measure("text_to_image_hubness", "hubness of images", "skewness of how often each is found"),
    Measure("image_to_text_orphans", "texts never found", "share in nobody's first 10 answers"),
    Measure("text_to_image_orphans", "images never found", "share in nobody's first 10 answers"),
    Measure(
        "guaranteed_recall@1",
        "guaranteed recall@1",
        "by the loss alone; 0: nothing (Proposition 1)",
    ),
)
MARGIN_MEASURES = (
    Measure("margin", "margin", "half the gap between worst positive and worst negative pair"),
    Measure("margin_5_95", "margin, 5 % and 95 %", "without the worst 5 % of each kind"),
    Measure(
        "margin_of_means", "margin of means", "half the gap between mean positive and negative"
    ),
    Measure(
        "image_row_margin_mean", "margin of a row", "mean over images: own text against others"
    ),
    Measure(
        "text_row_margin_mean", "margin of a column", "mean over texts: own image against others"
    ),
    Measure("relative_bias", "relative bias", "cosine halfway between the worst of each kind"),
    Measure("relative_bias_5_95", "relative bias, 5 % and 95 %", "without the worst 5 %"),
)


def show(value: float | None, form: str = "{:.3f}") -> str:
    """Write a number; "n/a" for one that is missing or not finite.

    Example:
        >>> show(0.12345), show(float("nan")), show(1200, "{:,.0f}")
        ('0.123', 'n/a', '1,200')
    """
    return "n/a" if value is None or not math.isfinite(value) else form.format(value)


def known(metrics: Mapping[str, float], *keys: str) -> list[float] | None:
    """Return the numbers of several names; None unless all are there and finite.

    Example:
        >>> known({"a": 1.0, "b": 2.0}, "b", "a"), known({"a": 1.0}, "a", "b")
        ([2.0, 1.0], None)
    """
    values = [metrics.get(key, math.nan) for key in keys]
    return values if all(map(math.isfinite, values)) else None


def table_of(runs: Sequence[RunRecord], measures: Sequence[Measure]) -> str:
    """Write a table of the newest evaluations, a row a measure and a column a run.

    Measures that no run has are left out; "" if there is none at all.
    """
    rows = [
        [f"{each.label}\n{each.meaning}", *(show(run.metrics.get(each.key)) for run in runs)]
        for each in measures
        if any(each.key in run.metrics for run in runs)
    ]
    if not rows:
        return ""
    return render_table(columns_of(runs), rows)
