"""The best of several runs, whether that is more than noise, and how each was made."""

import math
from collections.abc import Mapping, Sequence

from dist_siglip.data.samples.picture_policy import BEFORE_THE_SETTINGS
from dist_siglip.report.history import printable
from dist_siglip.report.measures import DIRECTIONS, Measure, known, show, table_of
from dist_siglip.report.page import (
    Section,
    Verdict,
    columns_of,
    render_card,
    render_columns,
    render_details,
    render_missing,
    render_table_card,
)
from dist_siglip.report.records import RunRecord
from dist_siglip.system.redaction import redact, redact_setting

_MOST_TEXT = 20_000
_MOST_CELL = 60
_MOST_ROWS = 60


def make_origin(runs: Sequence[RunRecord]) -> Section:
    """List settings that differ, what could not be read, and the files themselves."""
    parts = []
    if len(runs) > 1:
        rows = differing_settings(runs)
        columns = ("setting", *(run.name for run in runs))
        parts.append(
            render_table_card("Settings that differ", columns, rows, is_wordy=True)
            if rows
            else render_missing("The settings of these runs are the same.")
        )
    for run in runs:
        whose = f"{run.name}: " if len(runs) > 1 else ""
        parts += [render_missing(whose + note) for note in run.notes]
        rows = [[name, show(value, "{:.6g}")] for name, value in sorted(run.metrics.items())]
        if rows:
            text = "\n".join(f"{name:<36}{value}" for name, value in rows)
            parts.append(render_details(f"{whose}all numbers of the newest evaluation", text))
        for name, text in run.texts.items():
            cut = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}\n... (cut)"
            parts.append(render_details(whose + name, redact(cut)))
        if not run.texts:
            parts.append(render_missing(f"{whose}config.yaml and provenance.json are not there."))
    return Section("origin", "How it was made", [], parts)


def differing_settings(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Settings in which runs differ, with the value of each run; run_dir is not one."""
    names = sorted({name for run in runs for name in run.settings} - {"run_dir"})
    rows = []
    for name in names:
        values = [redact_setting(name, run.settings.get(name, "not set")) for run in runs]
        if len(set(values)) > 1:
            cells = [v if len(v) <= _MOST_CELL else f"{v[:_MOST_CELL]} ..." for v in values]
            rows.append([name, *cells])
    return rows[:_MOST_ROWS]


_ERRORS = 2.0  # standard errors of a difference, below which it is taken for noise
_MEASURES = (
    *(Measure(f"{key}_recall@1", f"recall@1, {label}", "") for label, key in DIRECTIONS),
    Measure("loss", "validation loss", ""),
    Measure("margin_5_95", "margin without the worst 5 %", ""),
    Measure("modality_gap", "modality gap", ""),
)

# Settings that decide how a pair is seen or counted, and what runs of before did.
_SEEN_BY = {
    **{f"data.{name}": value for name, value in BEFORE_THE_SETTINGS.items()},
    "data.picture_id": None,
}


def make(runs: Sequence[RunRecord]) -> Section | None:
    """Set the most asked numbers side by side; None for a single run."""
    if len(runs) < 2:
        return None
    table = table_of(runs, _MEASURES)
    parts = [render_columns([render_card("Side by side", table), _seen_by(runs)])] if table else []
    best, verdict = judge(runs)
    return Section("comparison", "Comparison", [(best, verdict)], parts)


def judge(runs: Sequence[RunRecord]) -> tuple[RunRecord, Verdict]:
    """Find the run of the highest recall@1, the mean of both directions, where that is fair.

    Runs are compared after the same number of steps and on the same pairs, seen alike; of runs
    that were last evaluated at different steps, the last step in common counts.
    """
    evaluated = [run for run in runs if mean_recall(run) is not None]
    if len(evaluated) < 2:
        text = "Fewer than two of these runs have an evaluation of retrieval."
        return runs[0], Verdict("unknown", text)
    reasons = data_differences(evaluated)
    if reasons:
        return evaluated[0], Verdict(
            "watch",
            "These runs cannot be compared: they were evaluated on different data.",
            f"{'; '.join(reasons)}. Evaluate all runs on the same pairs, seen alike: dist-siglip "
            "validate.",
        )
    steps = {run.name: _evaluated_step(run) for run in evaluated}
    if len(set(steps.values())) == 1:
        return _find_best(evaluated, [mean_recall(run) for run in evaluated], "")
    told = ", ".join(f"{name} at {_shown(step)}" for name, step in steps.items())
    step = common_step(evaluated)
    if step is None:
        return evaluated[0], Verdict(
            "watch",
            "These runs cannot be compared: they were evaluated at different steps, and at none in "
            "common.",
            f"Newest evaluations: {told}. Train them equally long, or evaluate checkpoints of the "
            "same step.",
        )
    found = [mean_recall(run, step) for run in evaluated]
    return _find_best(
        evaluated,
        found,
        f"At step {step:,}, the last at which all were evaluated: ",
        f" Newest evaluations: {told}; these do not compare.",
    )


def _find_best(
    runs: Sequence[RunRecord],
    found: Sequence[tuple[float, float] | None],
    where: str,
    more: str = "",
) -> tuple[RunRecord, Verdict]:
    """Tell the best of runs that compare, and whether it is by more than noise."""
    known_ones = [(run, recall) for run, recall in zip(runs, found, strict=True) if recall]
    if len(known_ones) < 2:
        text = "Fewer than two of these runs have an evaluation of retrieval that can be used."
        return runs[0], Verdict("unknown", text)
    ordered = sorted(known_ones, key=lambda each: -each[1][0])
    (best, (highest, first_error)), (second, (next_highest, second_error)) = ordered[:2]
    difference, error = highest - next_highest, math.hypot(first_error, second_error)
    reason = (
        f"Mean recall@1 {highest:.3f}, then {next_highest:.3f} of {second.name}: a difference of "
        f"{difference:.3f}, with a standard error of {error:.3f}.{more}"
    )
    if difference <= _ERRORS * error:
        text = f"{where}{best.name} has the highest recall@1, within noise of {second.name}."
        return best, Verdict("note", text, reason)
    reason += " What differs in their settings stands at the end."
    return best, Verdict(
        "good", f"{where}{best.name} has the highest recall@1, beyond noise.", reason
    )


def data_differences(runs: Sequence[RunRecord]) -> list[str]:
    """Say in what the data of evaluations differ: pairs, captions, pictures, how they were seen."""
    found = []
    pairs = {run.name: run.metrics["gallery_pairs"] for run in runs}
    if len(set(pairs.values())) > 1:
        told = ", ".join(f"{name} {number:,.0f}" for name, number in pairs.items())
        found.append(f"numbers of pairs ({told}): the fewer, the easier")
    elif all(run.captions for run in runs) and len({tuple(run.captions) for run in runs}) > 1:
        found.append("the captions of their validation pairs")
    elif len({_pictures_of(run) for run in runs if run.pictures}) > 1:
        found.append("the pictures of their validation pairs")
    elif not all(run.captions for run in runs):
        shards = {str(run.settings.get("data.val_shards")) for run in runs}
        if len(shards) > 1:
            found.append(f"data.val_shards ({printable(' against '.join(sorted(shards)))})")
    for name, default in _SEEN_BY.items():
        values = {run.name: str(run.settings.get(name, default)) for run in runs if run.settings}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{run} {printable(value)}" for run, value in values.items())
            found.append(f"{name} ({told})")
    return found


def common_step(runs: Sequence[RunRecord]) -> int | None:
    """Last step at which every run logged an evaluation of retrieval; None without one."""
    shared: set[int] | None = None
    for run in runs:
        logged = [run.series.get(f"val/{key}_recall@1") for _, key in DIRECTIONS]
        if any(series is None for series in logged):
            return None
        steps = set.intersection(*(set(s.steps.tolist()) for s in logged if s is not None))
        shared = steps if shared is None else shared & steps
    return max(shared) if shared else None


def mean_recall(run: RunRecord, step: int | None = None) -> tuple[float, float] | None:
    """Mean recall@1 of both directions and its standard error; None without an evaluation.

    The directions are taken for one measurement: their queries are the same pairs.

    Args:
        run: the run.
        step: of an evaluation that was logged; None for the newest.
    """
    metrics: Mapping[str, float] = run.metrics
    if step is not None:
        logged = {f"{key}_recall@1": run.series[f"val/{key}_recall@1"] for _, key in DIRECTIONS}
        metrics = dict(metrics) | {
            name: float(series.values[series.steps == step][0]) for name, series in logged.items()
        }
    found = known(metrics, *(f"{key}_recall@1" for _, key in DIRECTIONS), "gallery_pairs")
    if found is None or found[2] < 1 or not 0 <= min(found[:2]) <= max(found[:2]) <= 1:
        return None
    recall = (found[0] + found[1]) / 2
    return recall, math.sqrt(recall * (1 - recall) / found[2])


def _evaluated_step(run: RunRecord) -> float | None:
    """Step of the newest evaluation, if its file or the log says."""
    step = run.metrics.get("step")
    if step is None:
        series = run.series.get(f"val/{DIRECTIONS[0][1]}_recall@1")
        step = None if series is None else float(series.steps[-1])
    return step


def _shown(step: float | None) -> str:
    return "a step not known" if step is None else f"step {step:,.0f}"


def _pictures_of(run: RunRecord) -> tuple[tuple[int, str], ...]:
    return tuple((picture.row, picture.data_uri) for picture in run.pictures)


def _seen_by(runs: Sequence[RunRecord]) -> str:
    """List at which step, and on how many pairs, the numbers beside were measured."""
    rows = [
        ["evaluated at", *(_shown(_evaluated_step(run)) for run in runs)],
        ["validation pairs", *(show(run.metrics.get("gallery_pairs"), "{:,.0f}") for run in runs)],
    ]
    return render_table_card("Measured", columns_of(runs), rows)
