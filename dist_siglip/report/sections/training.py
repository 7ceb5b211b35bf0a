"""Course of a run: loss, scale, bias, gradient and speed; replaced samples and skipped steps."""

from collections.abc import Sequence

import numpy as np

from dist_siglip.report.canvas import INK, TEXT_COLOUR, Curve, Series, colour_of, draw_curves
from dist_siglip.report.history import Reasons
from dist_siglip.report.measures import show
from dist_siglip.report.page import (
    Section,
    Verdict,
    columns_of,
    judge_each,
    render_columns,
    render_details,
    render_figure,
    render_table_card,
)
from dist_siglip.report.records import RunRecord

_MANY_BAD = 0.001  # of the samples seen
_MANY_SKIPPED = 0.01  # of the steps
_MOST_REASONS = 8
_OF_CAPTIONS = "train/pair_loss_"  # of one field, where several train together
_SPEED, _WAIT = "train/pairs_per_second", "train/data_wait_percent"
_BOUND, _SOME = 33.0, 10.0  # percent of the time spent waiting for data
_SLOWER = 0.8  # of the first half, below which a run has become slow
_RISE = 1.02  # of the loss over its lowest value, that is more than noise
_FALL = 0.98  # over the last quarter, below which the loss is still falling
_RATE = "train/learning_rate"


def make_data(runs: Sequence[RunRecord]) -> Section:
    """Count samples that were replaced and steps that were skipped, by reason."""
    rows = [
        ["passes over the data", *(show(run.last("data/epochs"), "{:.2f}") for run in runs)],
        [
            "replaced samples\nbad ones, in whose place another stood",
            *(show(run.last("train/substituted_samples"), "{:,.0f}") for run in runs),
        ],
        ["skipped steps", *(show(run.last("train/skipped_steps"), "{:,.0f}") for run in runs)],
        [
            "equal captions or pictures in a batch\npairs of them, newest logged batch",
            *(show(run.last("train/duplicate_captions"), "{:,.0f}") for run in runs),
        ],
        [
            "validation pairs\nthat the newest evaluation saw",
            *(show(run.metrics.get("gallery_pairs"), "{:,.0f}") for run in runs),
        ],
        [
            "validation pairs there are",
            *(show(run.metrics.get("available_pairs"), "{:,.0f}") for run in runs),
        ],
        [
            "different captions among them",
            *(show(run.metrics.get("distinct_captions"), "{:,.0f}") for run in runs),
        ],
        [
            "different pictures among them",
            *(show(run.metrics.get("distinct_pictures"), "{:,.0f}") for run in runs),
        ],
    ]
    rows = [row for row in rows if any(cell != "n/a" for cell in row[1:])]
    cards = [render_table_card("In numbers", columns_of(runs), rows)] if rows else []
    listed = []
    for run in runs:
        whose = f" ({run.name})" if len(runs) > 1 else ""
        for title, reasons in (
            ("Why samples were replaced", run.incidents.bad_samples),
            ("Why steps were skipped", run.incidents.skipped_steps),
        ):
            if reasons.total:
                cards.append(render_table_card(title + whose, ("reason", "times"), _rows(reasons)))
                first = "The first of them" + whose
                listed.append(render_details(first, "\n".join(reasons.examples)))
    verdicts = judge_each(runs, judge_samples, judge_steps, judge_captions)
    return Section("data", "Data health", verdicts, [render_columns(cards), *listed])


def judge_samples(run: RunRecord) -> Verdict:
    """Say how many samples were bad."""
    replaced = run.last("train/substituted_samples")
    if replaced is None:
        return Verdict("unknown", "The run has not logged how many samples were bad.")
    if not replaced:
        return Verdict("good", "Every sample was sound.", "None had to be replaced by another.")
    batch = run.settings.get("data.global_batch_size")
    seen = run.last_step * batch if isinstance(batch, int) and batch > 0 else None
    share = "" if not seen else f", {100 * replaced / seen:.2f} % of those seen"
    common = run.incidents.bad_samples.counts.most_common(1)
    reason = f"Most often: {common[0][0]}." if common else "They are named in bad_samples.jsonl."
    tone = "watch" if not seen or replaced > _MANY_BAD * seen else "note"
    return Verdict(
        "watch" if tone == "watch" else "note",
        f"{replaced:,.0f} bad sample(s) were replaced by others{share}.",
        reason,
    )


def judge_steps(run: RunRecord) -> Verdict | None:
    """Say how many steps were skipped; nothing if none was."""
    skipped = run.last("train/skipped_steps") or run.incidents.skipped_steps.total
    if not skipped:
        return None
    common = run.incidents.skipped_steps.counts.most_common(1)
    share = skipped / max(1, run.last_step)
    return Verdict(
        "watch" if share > _MANY_SKIPPED else "note",
        f"{skipped:,.0f} of {run.last_step:,} steps were skipped.",
        f"Most often: {common[0][0]}." if common else "See skipped_steps.jsonl.",
    )


def judge_captions(run: RunRecord) -> Verdict | None:
    """Say so if many validation captions are equal, which makes retrieval look easier."""
    pairs, distinct = (run.metrics.get(k) for k in ("gallery_pairs", "distinct_captions"))
    if not pairs or not distinct or distinct > 0.5 * pairs:
        return None
    return Verdict(
        "watch",
        f"Only {distinct:,.0f} of {pairs:,.0f} validation captions are different.",
        "An equal caption counts as a hit, so recall is easier here than with captions of their "
        "own; and in training equal captions are negatives of each other unless the loss is told "
        "otherwise (duplicates).",
    )


def _rows(reasons: Reasons) -> list[list[str]]:
    return [[reason, f"{count:,}"] for reason, count in reasons.counts.most_common(_MOST_REASONS)]


def make_speed(runs: Sequence[RunRecord]) -> Section:
    """Draw pairs per second and the share of the time spent waiting for data."""
    names = [run.short_name if len(runs) > 1 else "" for run in runs]
    panels = [
        (
            label,
            [
                Curve(name if key == _SPEED else "", run.series[key], colour_of(i))
                for i, (run, name) in enumerate(zip(runs, names, strict=True))
                if key in run.series
            ],
        )
        for label, key in (("pairs per second", _SPEED), ("waiting for data, %", _WAIT))
    ]
    figure = render_figure(
        "Throughput",
        draw_curves("speed", "Pairs per second and share of time waiting for data", panels),
        "Pairs of the global batch per second of training; evaluation and saving are not counted.",
        missing="No speed was logged.",
    )
    rows = [
        [
            "pairs per second\nof training, median over logged steps",
            *(show(_median(run, _SPEED), "{:,.0f}") for run in runs),
        ],
        [
            "waiting for data\nshare of the time, median",
            *(show(_median(run, _WAIT), "{:.0f} %") for run in runs),
        ],
        [
            "processes\nof the newest start",
            *(show(_world_size(run), "{:.0f}") for run in runs),
        ],
        ["optimizer steps", *(f"{run.last_step:,}" for run in runs)],
    ]
    parts = [render_columns([figure, render_table_card("In numbers", columns_of(runs), rows)])]
    return Section("speed", "Throughput", judge_each(runs, judge_speed, judge_change), parts)


def judge_speed(run: RunRecord) -> Verdict:
    """Say whether the model or its data was waited for."""
    speed, wait = _median(run, _SPEED), _median(run, _WAIT)
    if speed is None or wait is None:
        return Verdict("unknown", "The run has logged no speed.")
    told = f"{speed:,.0f} pairs/s"
    if wait >= _BOUND:
        return Verdict(
            "watch",
            f"The run waits for its data for {wait:.0f} % of the time ({told}).",
            "More loader processes (data.workers_per_rank), smaller pictures in the shards, or a "
            "faster disk would speed it up; a faster device would not.",
        )
    if wait >= _SOME:
        return Verdict(
            "note",
            f"The run waits for its data for {wait:.0f} % of the time ({told}).",
            "One or two more loader processes may be worth trying.",
        )
    return Verdict(
        "good",
        f"The run is bound by its model: {told}.",
        f"It waits for data for {wait:.0f} % of the time.",
    )


def judge_change(run: RunRecord) -> Verdict | None:
    """Say so if the run has become slower."""
    speed = run.series.get(_SPEED)
    if speed is None or len(speed.values) < 8:
        return None
    first, second = (float(np.median(half)) for half in np.array_split(speed.values, 2))
    if second >= _SLOWER * first:
        return None
    return Verdict(
        "watch",
        f"The second half of the run was slower: {second:,.0f} pairs/s after {first:,.0f}.",
        "Look for another job on the machine, a hot device, a cache that no longer fits.",
    )


def _median(run: RunRecord, key: str) -> float | None:
    series = run.series.get(key)
    return None if series is None else series.median


def _world_size(run: RunRecord) -> float | None:
    value = run.provenance.get("world_size")
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else None


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
        loss, kind = _training_loss(run), "training loss"
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


def _training_loss(run: RunRecord) -> Series | None:
    """Pairwise loss, as the validation has it: a part of what trains with anything beside it.

    None if teachers are all there is.
    """
    if "train/distillation_loss" in run.series or "train/mined_loss" in run.series:
        return run.series.get("train/base_loss")
    return run.series.get("train/pair_loss", run.series.get("train/loss"))


def _caption_losses(run: RunRecord) -> list[str]:
    """Names of the logged losses of captions that train together."""
    return sorted(name for name in run.series if name.startswith(_OF_CAPTIONS))


def draw_loss(runs: Sequence[RunRecord]) -> str | None:
    """Training and validation loss over steps; None if neither was logged."""
    alone = len(runs) == 1
    curves = []
    for index, run in enumerate(runs):
        for key, label, style, marker in (
            (None, "training batches", "-", ""),
            ("val/loss", "validation", "--", "s"),
        ):
            series = _training_loss(run) if key is None else run.series.get(key)
            if series is None:
                continue
            name = label if alone else f"{run.short_name}, {label}"
            colour = TEXT_COLOUR if alone and marker else colour_of(index)
            curves.append(Curve(name, series, colour, style, marker))
        for place, key in enumerate(_caption_losses(run) if alone else [], start=1):
            label = f"captions {key.removeprefix(_OF_CAPTIONS)}"
            curves.append(Curve(label, run.series[key], colour_of(place), ":"))
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


def _relative_bias(scale: Series, bias: Series) -> Series | None:
    steps, at_scale, at_bias = np.intersect1d(scale.steps, bias.steps, return_indices=True)
    scales = scale.values[at_scale]
    if not len(steps) or (scales <= 0).any():
        return None
    return Series(steps, -bias.values[at_bias] / scales)
