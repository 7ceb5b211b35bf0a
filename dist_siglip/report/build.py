"""From a run folder to report.html: which sections there are, and what they say."""

import logging
import math
from pathlib import Path

import numpy as np

from dist_siglip.atomic import write_atomically
from dist_siglip.report.figures import (
    draw_logits,
    draw_loss,
    draw_modalities,
    draw_scale_and_bias,
)
from dist_siglip.report.gallery import rank_captions
from dist_siglip.report.page import (
    render_details,
    render_figure,
    render_gallery,
    render_missing,
    render_page,
    render_section,
    render_table,
)
from dist_siglip.report.records import RunRecord, read_run
from dist_siglip.runs import RunFolder

logger = logging.getLogger(__name__)

_MOST_PICTURES = 24
_MOST_TEXT = 20_000
_NO_EVALUATION = "No evaluation with arrays is in this run folder; validate the run first."
_DIRECTIONS = (("image to text", "image_to_text"), ("text to image", "text_to_image"))
# Label, key, what it says.
_MODEL_MEASURES = (
    ("validation loss", "loss", "sigmoid loss of a random training batch of these pairs"),
    ("logit scale", "logit_scale", "multiplier of the cosine"),
    ("logit bias", "logit_bias", "added to the scaled cosine"),
    ("learned relative bias", "learned_relative_bias", "cosine above which the model says match"),
)
_SPACE_MEASURES = (
    ("modality gap", "modality_gap", "distance of the two centroids, 0 to 2"),
    ("relative modality gap", "relative_modality_gap", "0: modalities coincide, 1: far apart"),
    (
        "linear separability",
        "linear_separability",
        "0.5: modalities overlap, 1: a plane parts them",
    ),
    ("margin", "margin", "half the gap between worst positive and worst negative pair"),
    ("margin, 5 % and 95 %", "margin_5_95", "the same without the worst 5 % of each kind"),
    ("relative bias", "relative_bias", "cosine halfway between worst positive and worst negative"),
    ("relative bias, 5 % and 95 %", "relative_bias_5_95", "the same without the worst 5 %"),
    ("alignment", "alignment", "mean squared distance of a pair, 0 is perfect"),
    ("image uniformity", "image_uniformity", "0: one point, -4: spread over the sphere"),
    ("text uniformity", "text_uniformity", "0: one point, -4: spread over the sphere"),
    ("image effective rank", "image_effective_rank", "directions the images spread over"),
    ("text effective rank", "text_effective_rank", "directions the texts spread over"),
)


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the files of the run folder.

    One page that needs nothing else: headline numbers, loss, scale and bias, both modalities on
    two axes, logits, and images with their first five captions. Parts whose files are missing
    or damaged are named on the page. The page appears whole or not at all.

    Args:
        run_dir: the run folder; metrics.jsonl must be there.

    Returns:
        Path of the page.

    Raises:
        UserError: if the folder or its metrics.jsonl is missing.
    """
    run_dir = Path(run_dir)
    record = read_run(run_dir)
    path = RunFolder(run_dir).report
    write_atomically(path, _render(record))
    logger.info("report written to %s", path)
    return path


def _render(record: RunRecord) -> str:
    last_step = max(int(series.steps[-1]) for series in record.series.values())
    sections = [
        _headline(record),
        _curves(record),
        _space(record),
        _gallery(record),
        _provenance(record),
    ]
    return render_page(
        f"Run {record.name}", f"dist_siglip, after {last_step} optimizer steps", sections
    )


def _headline(record: RunRecord) -> str:
    metrics = record.metrics
    cards = []
    if any(f"{key}_recall@1" in metrics for _, key in _DIRECTIONS):
        columns = ("recall", "@1", "@5", "@10", "median rank")
        recalls = [
            [
                label,
                *(_number(metrics, f"{key}_recall@{k}") for k in (1, 5, 10)),
                _number(metrics, f"{key}_median_rank", "{:.0f}"),
            ]
            for label, key in _DIRECTIONS
        ]
        cards.append(
            f'{render_table(columns, recalls)}<p class="soft">{_gallery_note(metrics)}</p>'
        )
    model_rows = _measure_rows(metrics, _MODEL_MEASURES)
    speed = record.series.get("train/pairs_per_second")
    if speed is not None:
        median = float(np.median(speed.values))
        label = "pairs per second\nof training, median over logged steps"
        model_rows.append([label, f"{median:,.0f}"])
    if model_rows:
        cards.append(render_table((), model_rows))
    space_rows = _measure_rows(metrics, _SPACE_MEASURES)
    stacked = "".join(f'<div class="card">{card}</div>' for card in cards)
    parts = [f'<div class="stack">{stacked}</div>'] if cards else []
    if space_rows:
        parts.append(f'<div class="card">{render_table((), space_rows)}</div>')
    if not metrics:
        parts.append(render_missing("This run has not been evaluated yet."))
    return render_section("In numbers", f'<div class="columns">{"".join(parts)}</div>')


def _measure_rows(
    metrics: dict[str, float], measures: tuple[tuple[str, str, str], ...]
) -> list[list[str]]:
    return [
        [f"{label}\n{meaning}", _number(metrics, key)]
        for label, key, meaning in measures
        if key in metrics
    ]


def _gallery_note(metrics: dict[str, float]) -> str:
    """Say what the recall numbers are worth; made of numbers only, so it needs no escaping."""
    note = "An identical caption counts as a hit; ties count against the query."
    pairs, distinct = (
        metrics.get(name, math.nan) for name in ("gallery_pairs", "distinct_captions")
    )
    if pairs > 0 and distinct > 0:
        note = (
            f"Gallery of {pairs:.0f} pairs with {distinct:.0f} distinct captions; chance of "
            f"recall@1 is about {1 / distinct:.2g}. {note}"
        )
    return note


def _curves(record: RunRecord) -> str:
    figures = [
        render_figure(
            "Loss",
            draw_loss(record.series),
            "Validation loss is the expected loss of a random batch of training size.",
            missing="No loss was logged.",
        ),
        render_figure(
            "Scale and bias",
            draw_scale_and_bias(record.series),
            "Logit = scale * cosine + bias. The relative bias, -bias / scale, is the cosine at "
            "which the model sees a match; squares mark the best threshold for validation pairs.",
            missing="Neither scale nor bias was logged.",
        ),
    ]
    return render_section("Training", f'<div class="columns">{"".join(figures)}</div>')


def _space(record: RunRecord) -> str:
    images, texts = (record.arrays.get(f"{kind}_features") for kind in ("image", "text"))
    points = None if images is None or texts is None else draw_modalities(images, texts)
    scale, bias = (record.metrics.get(name) for name in ("logit_scale", "logit_bias"))
    figures = [
        render_figure(
            "Both modalities",
            points,
            "Principal axes of images and texts together; lines join some pairs. Two separate "
            "clouds are usual after contrastive training.",
            missing=_NO_EVALUATION,
        ),
        render_figure(
            "Positive and negative pairs",
            draw_logits(record.arrays, scale, bias),
            "Share of all validation pairs of each kind, on a logarithmic axis. Above logit 0 the "
            "model says match.",
            missing=_NO_EVALUATION,
        ),
    ]
    return render_section("The space", f'<div class="columns">{"".join(figures)}</div>')


def _gallery(record: RunRecord) -> str:
    heading = "Images and their first five captions"
    images, texts = (record.arrays.get(f"{kind}_features") for kind in ("image", "text"))
    if images is None or texts is None or not record.pictures:
        return render_section(
            heading,
            render_missing("There are no example images with features in this run folder."),
        )
    pictures = record.pictures[:_MOST_PICTURES]
    exhibits = rank_captions(pictures, record.captions, images, texts)
    num_distinct = len(set(record.captions))
    num_right = sum(exhibit.answers[0].is_right for exhibit in exhibits)
    note = (
        f'<p class="soft">{num_right} of these {len(exhibits)} images have their own caption '
        f"first, among {num_distinct} distinct captions of {len(record.captions)} pairs. "
        "The heading is the true caption; the number is the cosine.</p>"
    )
    return render_section(heading, note, render_gallery(exhibits))


def _provenance(record: RunRecord) -> str:
    parts = [render_missing(note) for note in record.notes]
    for name, text in record.texts.items():
        cut = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}\n... (cut)"
        parts.append(render_details(name, cut))
    if not record.texts:
        parts.append(render_missing("config.yaml and provenance.json are not there."))
    return render_section("How it was made", *parts)


def _number(metrics: dict[str, float], key: str, form: str = "{:.3f}") -> str:
    value = metrics.get(key, math.nan)
    return form.format(value) if math.isfinite(value) else "n/a"
