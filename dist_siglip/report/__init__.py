"""One self-contained page about a run, or several: its sections and their order."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dist_siglip.errors import UserError
from dist_siglip.report.history import printable
from dist_siglip.report.measures import MODEL_MEASURES, table_of
from dist_siglip.report.page import (
    Section,
    render_card,
    render_columns,
    render_list,
    render_missing,
    render_page,
    render_section,
)
from dist_siglip.report.records import RunRecord, read_run
from dist_siglip.report.sections import (
    batches,
    capacity,
    comparison,
    embeddings,
    geometry,
    objectives,
    pairs,
    retrieval,
    shapes,
    training,
)
from dist_siglip.runs import RunFolder
from dist_siglip.system.atomic import write_atomically

logger = logging.getLogger(__name__)

MOST_RUNS = 8
_Maker = Callable[[Sequence[RunRecord]], Section | None]
# Sections in the order of the page, by the names that a failed one is reported under.
_SECTIONS: dict[str, _Maker] = {
    "comparison": comparison.make,
    "training": training.make,
    "objectives": objectives.make,
    "distillation": objectives.make_distillation,
    "curation": batches.make_curation,
    "patches": batches.make_patches,
    "speed": training.make_speed,
    "data_health": training.make_data,
    "retrieval": retrieval.make,
    "benchmarks": retrieval.make_benchmarks,
    "pairs": pairs.make,
    "calibration": pairs.make_calibration,
    "geometry": geometry.make,
    "shapes": shapes.make,
    "spectra": geometry.make_spectra,
    "capacity": capacity.make,
    "origin": comparison.make_origin,
}


def write_report(*run_dirs: Path, out: Path | None = None) -> Path:
    """Write one page about one run, or about several side by side, and folders of embeddings.

    It needs nothing else: no script, no file beside it, nothing fetched. Parts whose files are
    missing or damaged are named on the page. The page appears whole or not at all.

    Args:
        *run_dirs: run folders, with metrics.jsonl in each, and folders that ``embed`` wrote, whose
            recall has a section.
        out: name of the page; by default RUN/report.html of a single run.

    Returns:
        Path of the page.

    Raises:
        UserError: if a folder or its metrics.jsonl is missing, there is no or more than
            ``MOST_RUNS`` folders, or several folders and no ``out``.
    """
    folders = [Path(folder) for folder in run_dirs]
    if not 1 <= len(folders) <= MOST_RUNS:
        raise UserError(f"runs ({len(folders)}) must be 1 to {MOST_RUNS} folders")
    if out is None and len(folders) > 1:
        raise UserError("out (not set) must name the page of several runs")
    named = dict(zip(_names(folders), folders, strict=True))
    embedded = {name: path for name, path in named.items() if embeddings.is_embedded(path)}
    records = [read_run(path, name) for name, path in named.items() if name not in embedded]
    path = RunFolder(folders[0]).report if out is None else out
    write_atomically(path, _render(records, embedded).encode("utf-8", "replace"))
    logger.info("report written to %s", printable(str(path)))
    return path


def _render(runs: Sequence[RunRecord], embedded: Mapping[str, Path]) -> str:
    makers = dict(_SECTIONS) if runs else {}
    makers["embeddings"] = lambda _: embeddings.make(embedded)
    made = (_section(name, make, runs) for name, make in makers.items())
    sections = [section for section in made if section is not None]
    names = ", ".join([run.name for run in runs] or embedded)
    what = ("Run" if len(runs) == 1 else "Runs") if runs else "Embeddings"
    steps = ", ".join(f"{run.last_step:,}" for run in runs)
    return render_page(
        f"{what} {names}",
        f"dist_siglip, after {steps} optimizer steps" if runs else "dist_siglip, rows of shards",
        [(section.key, section.heading) for section in sections],
        [*([_glance(runs, sections)] if runs else []), *(each.render() for each in sections)],
    )


def _section(key: str, make: _Maker, runs: Sequence[RunRecord]) -> Section | None:
    """Make a section; one that its records do not allow says so in its place."""
    try:
        section = make(runs)
        if section is not None:
            section.render()
    except Exception as error:  # noqa: BLE001 - damaged records fail wherever they are looked at
        reason = printable(f"{type(error).__name__}: {error}")
        logger.warning("section %s of the report is left out (%s)", key, reason)
        told = f"This section is left out: its records cannot be used ({reason})."
        return Section(key, key.replace("_", " ").capitalize(), [], [render_missing(told)])
    return section


def _glance(runs: Sequence[RunRecord], sections: Sequence[Section]) -> str:
    """All conclusions in a list for each run, and what the model is."""
    cards = []
    for run in runs:
        headlines = [line for section in sections for line in section.headlines(run)]
        heading = "Conclusions" if len(runs) == 1 else f"Conclusions: {run.name}"
        cards.append(render_card(heading, render_list(headlines)))
    table = table_of(runs, MODEL_MEASURES)
    cards.append(
        render_card("The model", table)
        if table
        else render_missing("This run has not been evaluated yet.")
    )
    return render_section("At a glance", render_columns(cards))


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders; with as many folders above them as it takes to tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = [printable("/".join(path.parts[-depth:])) for path in resolved]
        if len(set(names)) == len(names):
            return names
    repeated, count = Counter(map(str, resolved)).most_common(1)[0]
    if count == 1:  # different, and shown alike
        return [f"{number}: {name}" for number, name in enumerate(names, 1)]
    raise UserError(f"runs ({repeated}) is named more than once; name each folder once")


__all__ = ["write_report"]
