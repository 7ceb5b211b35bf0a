"""What trains beside the labels of pairs: objectives on patches and views, what teachers say."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from dist_siglip.report.canvas import TEXT_COLOUR, Curve, colour_of, draw_curves
from dist_siglip.report.measures import known, show
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

_WEIGHT = "_weight"
_MEASURES = (
    ("caption_loss", "caption loss\nnats per token, written from left to right"),
    ("caption_token_accuracy", "tokens that are the likeliest"),
    ("caption_picture_gain", "worth of the picture\nrise of the loss with another's patches"),
    ("referring_loss", "text, then box\nloss, nats per token"),
    ("referring_picture_gain", "worth of the picture for it"),
    ("box_exact", "boxes that are exact\nall four parts, written for the text of a region"),
    ("box_iou_50", "boxes that overlap theirs by half\nintersection over union"),
    ("grounded_loss", "box, then text\nloss, nats per token"),
    ("grounded_token_accuracy", "its tokens that are the likeliest"),
    ("grounded_picture_gain", "worth of the picture for it"),
)
_OF_TEACHERS = frozenset(
    f"{name}_{term}"
    for name in ("self_distillation", "masked_prediction")
    for term in ("loss", "entropy", "mean_entropy", "kl", "centre_norm")
)
_BLIND = 0.02  # of the loss, below which the decoder might as well not look, or has not learned
_FEWEST = 4  # values of a term that show whether it falls


def make(runs: Sequence[RunRecord]) -> Section | None:
    """Draw terms, weights and measures; None if no run has an objective."""
    if not any(_weights(run) for run in runs):
        return None
    figure = render_figure(
        "Terms over the run",
        _draw(runs),
        "Each term is the mean over the global batch, before its weight.",
        missing="No term was logged.",
    )
    rows = [
        [label, *(show(run.metrics.get(key)) for run in runs)]
        for key, label in _MEASURES
        if any(key in run.metrics for run in runs)
    ]
    cards = [render_table_card("In numbers", columns_of(runs), rows)] if rows else []
    parts = [render_columns([figure, *cards])]
    return Section("objectives", "Objectives", judge_each(runs, judge, *_TEACHER_JUDGES), parts)


def judge(run: RunRecord) -> Verdict | None:
    """Say whether the decoder reads its captions off the pictures; None without an objective."""
    if not _weights(run):
        return None
    trouble = _judge_beginning(run) or _judge_fall(run)
    if trouble is not None or "train/captioning_weight" not in run.series:
        return trouble
    found = known(run.metrics, "caption_loss", "caption_token_accuracy", "caption_picture_gain")
    if found is None:
        return Verdict("unknown", "No evaluation has measured what the objectives have learned.")
    loss, accuracy, gain = found
    told = f"The caption loss is {loss:.3g} nats per token, {100 * accuracy:.0f} % of them right."
    if (boxes := known(run.metrics, "box_exact", "box_iou_50")) is not None:
        exact, near = (100 * share for share in boxes)
        told += (
            f" Of the boxes it writes for texts {near:.0f} % overlap theirs by half, {exact:.0f} % "
            "are exact."
        )
    if gain <= _BLIND * loss:
        return Verdict(
            "watch",
            f"The decoder writes captions without looking: the picture is worth {gain:.2g} nats.",
            f"{told} With the patches of another picture it does as well. That is usual early in "
            "training; later look at the learning rate, and at whether captions tell of pictures.",
        )
    return Verdict(
        "good",
        f"The decoder reads captions off the pictures, which are worth {gain:.2g} nats per token.",
        f"{told} With the patches of another picture it would be {loss + gain:.3g}.",
    )


def judge_teacher(run: RunRecord, name: str) -> Verdict | None:
    """Say whether a teacher tells pictures apart, at the end of a run; None if it was not used."""
    gauges = ("entropy", "mean_entropy", "kl", "centre_norm")
    found = [run.series.get(f"train/{name}_{gauge}") for gauge in gauges]
    if None in found:
        return None
    values = (float(np.median(each.tail(0.25))) for each in found if each is not None)
    return judge_gauges(name, *values)


def judge_gauges(name: str, entropy: float, mean: float, kl: float, centre: float) -> Verdict:
    """Say by its gauges whether a teacher still tells pictures apart, see ``EmaTeacher.gauges``.

    Both collapses leave the loss low or flat: all choices fall on one prototype, or on all alike.
    """
    whose = f"The teacher of {name.replace('_', ' ')}"
    told = (
        f"The entropy of its choice is {entropy:.2f} of that of a guess, that of the mean of its "
        f"choices {mean:.2f}; the student is {kl:.3g} nats from it, the centre's norm {centre:.3g}."
    )
    remedy = (
        "Nothing is learned of it. Lower the weight or teacher_temperature, raise "
        "teacher_momentum, or leave the objective out."
    )
    if entropy > _UNIFORM:
        return Verdict(
            "bad", f"{whose} has collapsed: it finds all prototypes alike.", f"{told} {remedy}"
        )
    if mean < _ONE_POINT:
        return Verdict(
            "bad", f"{whose} has collapsed: it finds all pictures alike.", f"{told} {remedy}"
        )
    if mean - entropy < _APART:
        return Verdict(
            "watch",
            f"{whose} hardly tells pictures apart.",
            f"{told} The two come near each other in a collapse; early in training that is usual.",
        )
    return Verdict("good", f"{whose} tells pictures apart.", told)


_UNIFORM, _ONE_POINT, _APART = 0.99, 0.05, 0.02  # shares of the entropy of a guess
_TEACHER_JUDGES = (
    partial(judge_teacher, name="self_distillation"),
    partial(judge_teacher, name="masked_prediction"),
)


def _judge_beginning(run: RunRecord) -> Verdict | None:
    """Name objectives whose weight is still 0; None if all count."""
    idle = [name for name in _weights(run) if not run.series[name].values.any()]
    if not idle:
        return None
    names = ", ".join(name.removeprefix("train/").removesuffix(_WEIGHT) for name in idle)
    return Verdict(
        "watch",
        f"Not begun by step {run.series[idle[0]].steps[-1]}: {names}.",
        "Its weight was 0 in every step that was logged; see weight and start in the "
        "configuration. Its heads are as they were built.",
    )


def _judge_fall(run: RunRecord) -> Verdict | None:
    """Say so if the caption loss stays where it began; None if it falls, or has too few values."""
    series = run.series.get("train/caption_loss")
    if series is None or len(series.values) < _FEWEST:
        return None
    first, now = float(series.values[0]), float(np.median(series.tail(0.25)))
    if now < (1 - _BLIND) * first:
        return None
    return Verdict(
        "watch",
        f"The decoder does not learn: the caption loss is {now:.3g} nats per token, and was "
        f"{first:.3g} at step {series.steps[0]}.",
        "It begins at the logarithm of the number of words, which is to guess any word alike, and "
        "falls within the first hundreds of steps; look at the learning rate, at the weight of "
        "the objective, and at whether captions reach the model as they should.",
    )


def _weights(run: RunRecord) -> list[str]:
    """Names of the logged weights of objectives."""
    return [name for name in run.series if name.startswith("train/") and name.endswith(_WEIGHT)]


def _draw(runs: Sequence[RunRecord]) -> str | None:
    panels: dict[str, list[Curve]] = {}
    alone = len(runs) == 1
    for index, run in enumerate(runs):
        for name, series in run.series.items():
            kind, _, term = name.partition("/")
            is_measure = term in {key for key, _ in _MEASURES} or term in _OF_TEACHERS
            if kind not in ("train", "val") or not (is_measure or name in _weights(run)):
                continue
            told = {"train": "training", "val": "validation"}[kind]
            whose = "" if alone else f"{run.short_name}, "
            colour = TEXT_COLOUR if alone and kind == "val" else colour_of(index)
            style, marker = ("--", "s") if kind == "val" else ("-", "")
            curve = Curve(f"{whose}{told}", series, colour, style, marker)
            panels.setdefault(term.replace("_", " "), []).append(curve)
    return draw_curves(
        "objectives", "Terms and weights of objectives over steps", [*panels.items()]
    )


_LOSS, _KL, _GAIN = (f"train/distillation_{name}" for name in ("loss", "kl", "gain"))
_SURE = 0.02  # entropy of teachers by what a guess costs, below which their answers are labels


def make_distillation(runs: Sequence[RunRecord]) -> Section | None:
    """Draw what was learned of teachers; None if no run has any."""
    if not any(_LOSS in run.series for run in runs):
        return None
    panels = [
        (
            label,
            [
                Curve("" if len(runs) == 1 else run.short_name, run.series[key], colour_of(index))
                for index, run in enumerate(runs)
                if key in run.series
            ],
        )
        for key, label in ((_LOSS, "distillation"), (_KL, "kl divergence"), (_GAIN, "gain"))
    ]
    figure = render_figure(
        "Teachers over the run",
        draw_curves("distillation", "Cross-entropy with the teachers over steps", panels),
        "Kl divergence: the distillation loss less the teachers' own entropy; 0 for a student that "
        "agrees. Gain: how far it is below that of a guess for which all texts are alike.",
        missing="Nothing was logged.",
    )
    return Section("distillation", "Distillation", judge_each(runs, judge_distillation), [figure])


def judge_distillation(run: RunRecord) -> Verdict | None:
    """Say how much of what the teachers know was learned; None without teachers."""
    found = [run.series.get(key) for key in (_LOSS, _KL, _GAIN)]
    if None in found:
        return None
    loss, kl, gain = (float(np.median(each.tail(0.25))) for each in found if each is not None)
    entropy, known_by_teachers = loss - kl, gain + kl
    told = (
        f"The cross-entropy is {loss:.3g}, of which {entropy:.3g} is the teachers' own entropy; a "
        f"guess for which all texts are alike costs {gain + loss:.3g}."
    )
    if gain <= 0 or known_by_teachers <= 0:
        return Verdict(
            "watch",
            "The student tells no more of the teachers' answers than a guess.",
            f"{told} That is usual early in training; later look at the learning rate, and at "
            "scale and bias of the teachers.",
        )
    if entropy < _SURE * (gain + loss):
        return Verdict(
            "watch",
            "The teachers' answers are little else than the labels.",
            f"{told} They are that sure of pictures they were trained on, or their scale is too "
            "large; distillation then adds little where captions are right.",
        )
    return Verdict(
        "good",
        f"The student has {100 * gain / known_by_teachers:.0f} % of what the teachers tell.",
        told,
    )
