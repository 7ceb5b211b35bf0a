"""How does it do on data it was not made for?"""

from collections.abc import Sequence

from dist_siglip.report.measures import show
from dist_siglip.report.page import render_columns, render_table_card
from dist_siglip.report.records import RunRecord
from dist_siglip.report.section import Section
from dist_siglip.report.verdict import Verdict

_MOST_METRICS = 12


def make(runs: Sequence[RunRecord]) -> Section | None:
    """List the results of RUN/benchmarks, a table for each; None if no run has any."""
    results = {
        (each.dataset, each.task): None for run in runs for each in run.benchmarks if each.metrics
    }
    if not results:
        return None
    cards = []
    for dataset, task in results:
        by_run = [
            next((e.metrics for e in run.benchmarks if (e.dataset, e.task) == (dataset, task)), {})
            for run in runs
        ]
        names = list({name: None for metrics in by_run for name in metrics})[:_MOST_METRICS]
        rows = [
            [name, *(show(metrics.get(name), "{:.4g}") for metrics in by_run)] for name in names
        ]
        columns = ("", *(run.name for run in runs)) if len(runs) > 1 else ()
        heading = f"{dataset}, {task}" if task else dataset
        cards.append(render_table_card(heading, columns, rows))
    verdicts = [
        (
            run,
            Verdict(
                "note",
                f"{len(run.benchmarks)} benchmark(s) were run.",
                "Names and numbers are those of CLIP_benchmark, for its published tables.",
            ),
        )
        for run in runs
        if run.benchmarks
    ]
    return Section("benchmarks", "Benchmarks", verdicts, [render_columns(cards)])
