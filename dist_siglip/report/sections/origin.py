"""Settings that differ between runs, and the files each run was made with."""

from collections.abc import Sequence

from dist_siglip.data.remote.locations import redact
from dist_siglip.report.measures import show
from dist_siglip.report.page import Section, render_details, render_missing, render_table_card
from dist_siglip.report.records import RunRecord

_MOST_TEXT = 20_000
_MOST_CELL = 60
_MOST_ROWS = 60


def make(runs: Sequence[RunRecord]) -> Section:
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
        values = [redact(str(run.settings.get(name, "not set"))) for run in runs]
        if len(set(values)) > 1:
            cells = [v if len(v) <= _MOST_CELL else f"{v[:_MOST_CELL]} ..." for v in values]
            rows.append([name, *cells])
    return rows[:_MOST_ROWS]
