"""Loss, scale, bias and gradient over the run, and whether it has finished learning."""

from collections.abc import Sequence

import numpy as np

from dist_siglip.report.canvas import INK, TEXT_COLOUR, Curve, Series, colour_of, draw_curves
from dist_siglip.report.page import Section, Verdict, judge_each, render_columns, render_figure
from dist_siglip.report.records import RunRecord

_RISE = 1.02  # of the loss over its lowest value, that is more than noise
_FALL = 0.98  # over the last quarter, below which the loss is still falling


def make(runs: Sequence[RunRecord]) -> Section:
    """Draw loss, scale and bias, gradient and learning rate."""
    figures = [
        render_figure(
            "Loss",
            draw_loss(runs),
            "Validation loss is the expected loss of a random batch of training size.",
            missing="No loss was logged.",
        ),
        render_figure(
            "Scale and bias",
            draw_scale_and_bias(runs),
            "Logit = scale * cosine + bias. The relative bias, -bias / scale, is the cosine at "
            "which the model sees a match; squares mark the best threshold for validation pairs.",
            missing="Neither scale nor bias was logged.",
        ),
        render_figure(
            "Gradient and learning rate",
            draw_gradient(runs),
            "Norm of the gradient before clipping. A spike now and then is usual.",
            missing="Neither gradient norm nor learning rate was logged.",
        ),
    ]
    return Section("training", "Training", judge_each(runs, judge), [render_columns(figures)])


def judge(run: RunRecord) -> Verdict:
    """Tell a run that over-fits from one that is still falling and one that has levelled off."""
    validation = run.series.get("val/loss")
    loss, kind = validation, "validation loss"
    if loss is None or len(loss.values) < 3:
        loss, kind = run.series.get("train/loss"), "training loss"
    if loss is None or len(loss.values) < 3:
        return Verdict("unknown", "Too few losses were logged to see where the run is going.")
    best = int(np.argmin(loss.values))
    lowest = float(loss.values[best])
    start = f"{kind.capitalize()} {loss.values[0]:.3g} at step {loss.steps[0]}"
    told = f"{start}, {loss.last:.3g} at the end"
    if loss is validation and lowest > 0 and loss.last > _RISE * lowest:
        return Verdict(
            "watch",
            f"The validation loss was lowest at step {loss.steps[best]} and has risen since.",
            f"It was {lowest:.3g} there and is {loss.last:.3g} now: the run fits its training "
            "pairs at the cost of others. Keep the best checkpoint, train shorter, or add data.",
        )
    quarter = max(2, len(loss.values) // 4)
    before, after = (
        float(np.median(part)) for part in (loss.values[-2 * quarter : -quarter], loss.tail(0.25))
    )
    if after >= before > _FALL * float(loss.values[0]):
        return Verdict(
            "bad",
            "The loss has hardly fallen.",
            f"{told}. Look at the learning rate, at the captions, and at the data health below.",
        )
    if after < _FALL * before:
        return Verdict(
            "note",
            f"The {kind} is still falling.",
            f"{told}; median of the last quarter {after:.3g}, of the quarter before {before:.3g}. "
            "More steps would lower it further.",
        )
    return Verdict(
        "good", f"The {kind} has levelled off.", f"{told}; it changes little over the last quarter."
    )


def draw_loss(runs: Sequence[RunRecord]) -> str | None:
    """Training and validation loss over steps; None if neither was logged."""
    alone = len(runs) == 1
    curves = []
    for index, run in enumerate(runs):
        for key, label, style, marker in (
            ("train/loss", "training batches", "-", ""),
            ("val/loss", "validation", "--", "s"),
        ):
            series = run.series.get(key)
            if series is None:
                continue
            name = label if alone else f"{run.short_name}, {label}"
            colour = TEXT_COLOUR if alone and marker else colour_of(index)
            curves.append(Curve(name, series, colour, style, marker))
    return draw_curves(
        "loss",
        "Loss over optimizer steps, training and validation",
        [("loss", curves)],
        may_be_logarithmic=["loss"],
    )


def draw_scale_and_bias(runs: Sequence[RunRecord]) -> str | None:
    """Logit scale, logit bias and relative bias over steps; None if none was logged."""
    panels: dict[str, list[Curve]] = {"logit scale": [], "logit bias": [], "relative bias": []}
    for index, run in enumerate(runs):
        scale, bias = (run.series.get(f"train/{name}") for name in ("logit_scale", "logit_bias"))
        relative = run.series.get("train/relative_bias")
        if relative is None and scale is not None and bias is not None:
            relative = _relative_bias(scale, bias)
        alone = len(runs) == 1
        found = (("logit scale", scale), ("logit bias", bias), ("relative bias", relative))
        for place, (panel, series) in enumerate(found):
            if series is not None:
                is_named = panel == "logit scale" if not alone else panel == "relative bias"
                label = ("learned" if alone else run.short_name) if is_named else ""
                colour = colour_of(place if alone else index)
                panels[panel].append(Curve(label, series, colour))
        best = run.series.get("val/relative_bias")
        if best is not None and panels["relative bias"]:
            colour = INK if alone else colour_of(index)
            label = "best" if alone else ""
            panels["relative bias"].append(Curve(label, best, colour, "--", "s"))
    return draw_curves(
        "scale", "Logit scale, logit bias and relative bias over steps", list(panels.items())
    )


def draw_gradient(runs: Sequence[RunRecord]) -> str | None:
    """Gradient norm and learning rate over steps; None if neither was logged."""
    panels = []
    for label, key in (("gradient norm", "train/grad_norm"), ("learning rate", _RATE)):
        curves = [
            Curve(
                run.short_name if len(runs) > 1 and key != _RATE else "",
                run.series[key],
                colour_of(i),
            )
            for i, run in enumerate(runs)
            if key in run.series
        ]
        panels.append((label, curves))
    return draw_curves(
        "gradient",
        "Gradient norm and learning rate over steps",
        panels,
        may_be_logarithmic=["gradient norm"],
    )


_RATE = "train/learning_rate"


def _relative_bias(scale: Series, bias: Series) -> Series | None:
    steps, at_scale, at_bias = np.intersect1d(scale.steps, bias.steps, return_indices=True)
    scales = scale.values[at_scale]
    if not len(steps) or (scales <= 0).any():
        return None
    return Series(steps, -bias.values[at_bias] / scales)
