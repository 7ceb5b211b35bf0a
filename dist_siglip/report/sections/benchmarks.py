"""Results of benchmarks, and their course over the run."""

from collections.abc import Sequence

from dist_siglip.report.canvas import STYLES, Curve, colour_of, draw_curves
from dist_siglip.report.measures import show
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

_MOST_METRICS = 12
_MOST_CURVES = 3
_MOST_TOLD = 4


def make(runs: Sequence[RunRecord]) -> Section | None:
    """List the results of RUN/benchmarks, and draw those of several steps; None without any."""
    results = {
        (each.dataset, each.task): None for run in runs for each in run.benchmarks if each.metrics
    }
    if not results:
        return None
    cards = []
    for index, (dataset, task) in enumerate(results):
        by_run = [
            next((e.metrics for e in run.benchmarks if (e.dataset, e.task) == (dataset, task)), {})
            for run in runs
        ]
        names = list({name: None for metrics in by_run for name in metrics})[:_MOST_METRICS]
        rows = [
            [name, *(show(metrics.get(name), "{:.4g}") for metrics in by_run)] for name in names
        ]
        heading = dataset if task in ("", dataset) else f"{dataset}, {task}"
        cards.append(render_table_card(heading, columns_of(runs), rows))
        drawing = draw_over_steps(runs, dataset, name=f"benchmark-{index}")
        if drawing is not None:
            caption = "Over the steps at which it was run."
            cards.append(render_figure(heading, drawing, caption, missing=""))
    verdicts = judge_each(runs, judge)
    return Section("benchmarks", "Benchmarks", verdicts, [render_columns(cards)])


def judge(run: RunRecord) -> Verdict | None:
    """Tell the first number of each benchmark; None without any."""
    results = [each for each in run.benchmarks if each.metrics]
    if not results:
        return None
    first = [(each.dataset, *next(iter(each.metrics.items()))) for each in results[:_MOST_TOLD]]
    told = ", ".join(f"{dataset} {value:.3g} ({name})" for dataset, name, value in first)
    more = f", and {len(results) - len(first)} more" if len(results) > len(first) else ""
    return Verdict(
        "note",
        f"Benchmarks: {told}{more}.",
        "Classification and retrieval have the names and definitions of CLIP_benchmark, so they "
        "can be set beside its published tables.",
    )


def draw_over_steps(runs: Sequence[RunRecord], dataset: str, *, name: str) -> str | None:
    """Draw the first few metrics of a benchmark that were logged at several steps; None without."""
    curves = []
    for index, run in enumerate(runs):
        logged = {
            key.removeprefix(f"benchmarks/{dataset}/"): series
            for key, series in run.series.items()
            if key.startswith(f"benchmarks/{dataset}/") and len(series.steps) > 1
        }
        for place, (metric, series) in enumerate(list(logged.items())[:_MOST_CURVES]):
            label = metric if len(runs) == 1 else f"{run.short_name}, {metric}"
            colour = colour_of(place if len(runs) == 1 else index)
            curves.append(Curve(label, series, colour, STYLES[place], "s"))
    return draw_curves(name, "Results of a benchmark over steps", [("", curves)])
