"""What quantised rows and indexes of embeddings find of the exact nearest rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_siglip.data.samples.cached_features import MANIFEST
from dist_siglip.evaluation.embed.nearest_index import measured_name, read_metrics
from dist_siglip.report.page import Section, Tone, Verdict, render_table_card, render_verdict

_JUDGED = "recall@10"
_GOOD, _FAIR = 0.95, 0.8


def is_embedded(folder: Path) -> bool:
    """Tell whether a folder is one that ``embed`` wrote."""
    return (folder / MANIFEST).is_file()


def make(folders: Mapping[str, Path]) -> Section | None:
    """Tabulate the recall that ``embed`` measured, by name of the folder; None without folders."""
    if not folders:
        return None
    verdicts, columns = [], []
    for folder, path in folders.items():
        measured = read_metrics(path)
        run = folder if len(folders) > 1 else ""
        found = map(judge, measured, measured.values())
        verdicts += [render_verdict(verdict, run) for verdict in found]
        if not measured:
            text = (
                "Nothing was measured: rows are neither quantised nor indexed, so search is exact."
            )
            verdicts.append(render_verdict(Verdict("note", text), run))
        for name, numbers in measured.items():
            heading = measured_name(name, numbers)
            columns.append((f"{heading}\n{folder}" if run else heading, numbers))
    names = dict.fromkeys(key for _, numbers in columns for key in numbers if "recall@" in key)
    rows = [
        [
            "queries",
            *(f"{numbers['queries']:,} {numbers['query_tower']}s" for _, numbers in columns),
        ],
        ["rows", *(f"{numbers['rows']:,}" for _, numbers in columns)],
        *([key.replace("_", " "), *(_share(key, each) for _, each in columns)] for key in names),
    ]
    note = (
        "Share of the exact nearest rows that is found; unscored: before the best are scored anew."
    )
    table = render_table_card("Recall", ["", *(name for name, _ in columns)], rows, note)
    return Section(
        "embeddings", "Search in embeddings", [], [*verdicts, *([table] * bool(columns))]
    )


def judge(name: str, numbers: Mapping[str, Any]) -> Verdict:
    """Say which part of the ten nearest rows is found."""
    found, what = numbers.get(_JUDGED), measured_name(name, numbers)
    if found is None:
        return Verdict("unknown", f"What {what} find of ten rows is not measured: there are fewer.")
    tone: Tone = "good" if found >= _GOOD else "note" if found >= _FAIR else "watch"
    remedy = "" if tone == "good" else "Rows of float16, or an index of another kind, find more."
    return Verdict(tone, f"{what}: {100 * found:.1f} % of the exact ten nearest are found.", remedy)


def _share(key: str, numbers: Mapping[str, Any]) -> str:
    return f"{numbers[key]:.4f}" if key in numbers else "-"
