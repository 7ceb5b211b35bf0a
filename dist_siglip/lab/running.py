"""Run experiments in processes, and write their records and pages.

Each experiment runs in a process with one thread, several at a time, the longest first: small
matrices are several times faster on one thread than on two. The folder of the lab holds NAME.json
and NAME.svg of each experiment and a page of each paper, PAPER.md; beside it lies FOLDER.md, with a
line for each experiment. On that page the text above a marker line is kept.
"""

import io
import json
import math
import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dist_siglip.errors import UserError, check_least
from dist_siglip.lab.experiment import DIFFERS, REPRODUCED, UNPUBLISHED, LabSettings, Outcome, Row
from dist_siglip.lab.experiments import EXPERIMENTS, PAPERS, check_names, function_of
from dist_siglip.system.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POLL_SECONDS = 0.2
_LEAST_PROGRESS = 0.005  # between two messages of a worker
_WRITTEN = "<!-- Written by dist-siglip lab from here on. -->"


@dataclass(frozen=True, kw_only=True)
class Record:
    """An experiment that was run.

    Attributes:
        name: of the experiment.
        rows: its table.
        notes: what the reader of the table must know.
        quick: whether it was the quick subset.
        seed: added to the authors' seed.
        cpu_seconds: of the process that ran it and of the processes it started.
    """

    name: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    quick: bool
    seed: int
    cpu_seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by verdict, whatever its explanation."""
        found = Counter(row.verdict.split(":")[0] for row in self.rows)
        return {name: found[name] for name in (REPRODUCED, "corrected", DIFFERS, UNPUBLISHED)}

    @property
    def is_sound(self) -> bool:
        """Whether no row differs without a reason."""
        return all(row.is_sound for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Return a dictionary for JSON, with NaN and infinity as words."""
        rows = [
            row._asdict() | {"ours": row.ours if math.isfinite(row.ours) else str(row.ours)}
            for row in self.rows
        ]
        return asdict(self) | {"rows": rows}


def write_record(
    folder: Path, name: str, outcome: Outcome, *, quick: bool, seed: int, cpu_seconds: float
) -> Record:
    """Write the numbers and the figure of an experiment, each file in one piece."""
    record = Record(
        name=name,
        rows=outcome.rows,
        notes=outcome.notes,
        quick=quick,
        seed=seed,
        cpu_seconds=round(cpu_seconds, 1),
    )
    write_atomically(folder / f"{name}.json", json.dumps(record.as_json(), indent=1) + "\n")
    write_atomically(folder / f"{name}.svg", _svg_of(outcome.figure, name))
    return record


def read_records(folder: Path) -> list[Record]:
    """Read the records of a folder, in the order of ``EXPERIMENTS``.

    Raises:
        UserError: if a file is no record.
    """
    records = []
    for path in (folder / f"{name}.json" for name in EXPERIMENTS):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(_row_from_json(row) for row in content.pop("rows"))
            notes = tuple(content.pop("notes"))
            records.append(Record(rows=rows, notes=notes, **content))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no record of the lab; remove it or run it again") from error
    return records


def page_of(folder: Path) -> Path:
    """Return the path of the page of a folder."""
    return folder.with_name(f"{folder.name}.md")


def write_page(folder: Path) -> Path:
    """Write the pages of the papers of all records of a folder, then the page that lists them.

    Returns:
        The path of the list.
    """
    path, records = page_of(folder), read_records(folder)
    for paper in PAPERS:
        of_paper = [record for record in records if EXPERIMENTS[record.name].paper == paper]
        if of_paper:
            write_atomically(folder / f"{paper}.md", _page_of_paper(paper, of_paper))
    above = path.read_text(encoding="utf-8") if path.is_file() else "# The lab\n\n"
    content = [above.split(_WRITTEN)[0] + _WRITTEN, _summary_of(records, folder.name)]
    write_atomically(path, "\n\n".join(content) + "\n")
    return path


def _page_of_paper(paper: str, records: Sequence[Record]) -> str:
    heading, source = PAPERS[paper]
    lines = [f"# {heading}", source]
    for record in records:
        lines += [f"## {record.name}", EXPERIMENTS[record.name].summary.capitalize()]
        lines.append(f"![{record.name}]({record.name}.svg)")
        lines += [markdown_table(record.rows), "\n".join(f"- {note}" for note in record.notes)]
    return "\n\n".join(line for line in lines if line) + "\n"


def markdown_table(rows: Sequence[Row]) -> str:
    """Format rows for a page.

    Example:
        >>> print(markdown_table([Row("margin", 0.24, 0.23911, 0.01, "reproduced")]))
        | quantity | published | ours | tolerance | verdict |
        | --- | ---: | ---: | ---: | --- |
        | margin | 0.24 | 0.2391 | 0.01 | reproduced |
    """
    cells = [[text.replace("|", r"\|") for text in cells_of(row)] for row in rows]
    head = [
        "| quantity | published | ours | tolerance | verdict |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in cells)])


def cells_of(row: Row) -> tuple[str, str, str, str, str]:
    """Return a row as text: four digits of what was measured here."""
    published = f"{row.published:g}" if isinstance(row.published, float | int) else row.published
    tolerance = "" if row.tolerance is None else f"{row.tolerance:g}"
    return row.quantity, published or "", f"{row.ours:.4g}", tolerance, row.verdict


def _summary_of(records: Sequence[Record], folder: str) -> str:
    head = "| experiment | asks | reproduced | corrected | differs | unpublished | CPU seconds |"
    lines = [head, "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for record in records:
        kind = " (quick)" if record.quick else ""
        counts = " | ".join(str(count) for count in record.counts.values())
        entry = EXPERIMENTS[record.name]
        link = f"[{record.name}]({folder}/{entry.paper}.md#{record.name})"
        lines.append(f"| {link}{kind} | {entry.summary} | {counts} | {record.cpu_seconds:.0f} |")
    return "\n".join(lines)


def _row_from_json(content: dict[str, Any]) -> Row:
    return Row(**content | {"ours": float(content["ours"])})


def _svg_of(figure: "Figure", name: str) -> bytes:
    """Render a figure as SVG; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=nothing, facecolor="white")
    return buffer.getvalue()


class LabRun(NamedTuple):
    """Experiments to run, and how."""

    names: Sequence[str]
    out: Path
    quick: bool = False
    seed: int = 0


def run_experiments(
    lab_run: LabRun, *, workers: int = 2, on_progress: Callable[[str, float], None]
) -> Iterator[Record]:
    """Run experiments and write their results; yield each when it is done.

    One that fails does not end the others; what it raised is raised last.

    Args:
        lab_run: what to run.
        workers: processes at a time; with 1 everything runs in this process. Experiments fewer
            than these may compute in several.
        on_progress: called with a name and the share of that experiment that is done.

    Raises:
        UserError: if there is no such experiment, or ``workers`` is below 1.
    """
    check_names(list(lab_run.names))
    check_least(1, workers=workers)
    longest_first = sorted(
        dict.fromkeys(lab_run.names), key=lambda name: -EXPERIMENTS[name].minutes
    )
    if workers == 1:
        for name in longest_first:
            yield _run_here(name, lab_run, 1, on_progress)
        return
    processes = max(1, workers // len(longest_first))
    context = multiprocessing.get_context("spawn")
    messages: multiprocessing.Queue[tuple[str, float]] = context.Queue()
    with ProcessPoolExecutor(
        min(workers, len(longest_first)),
        mp_context=context,
        initializer=_set_queue,
        initargs=(messages,),
    ) as pool:
        try:
            futures = {pool.submit(_run_there, name, lab_run, processes) for name in longest_first}
            yield from _finished(futures, lambda: _forward(messages, on_progress))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _finished(waiting: set[Future[Record]], poll: Callable[[], None]) -> Iterator[Record]:
    """Yield records as they come; raise the first failure after the others are done."""
    failures: list[Future[Record]] = []
    while waiting:
        done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
        poll()
        failures += [future for future in done if future.exception() is not None]
        yield from (future.result() for future in done if future not in failures)
    for future in failures:
        future.result()


_messages: Any = None  # the queue of this worker process


def _set_queue(messages: Any) -> None:
    """Keep the queue of progress messages in a worker process."""
    global _messages
    _messages = messages


def _run_there(name: str, lab_run: LabRun, processes: int) -> Record:
    last = 0.0

    def report(_: str, done: float) -> None:
        nonlocal last
        if done - last >= _LEAST_PROGRESS or done >= 1:
            last = done
            _messages.put((name, done))

    return _run_here(name, lab_run, processes, report)


def _run_here(
    name: str, lab_run: LabRun, processes: int, on_progress: Callable[[str, float], None]
) -> Record:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = _cpu_seconds()
    try:
        outcome = function_of(name)(
            LabSettings(
                quick=lab_run.quick,
                seed=lab_run.seed,
                processes=processes,
                progress=lambda done: on_progress(name, done),
            )
        )
    finally:
        torch.set_num_threads(threads)
    return write_record(
        lab_run.out,
        name,
        outcome,
        quick=lab_run.quick,
        seed=lab_run.seed,
        cpu_seconds=_cpu_seconds() - started,
    )


def _forward(messages: Any, on_progress: Callable[[str, float], None]) -> None:
    """Report the progress that workers have sent."""
    while not messages.empty():
        on_progress(*messages.get())


def _cpu_seconds() -> float:
    """CPU seconds of this process and of those it started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
