"""How is the outcome of an experiment kept and shown?

For each experiment NAME.json and NAME.svg in the folder of the lab, with a page for each paper,
PAPER.md; beside the folder FOLDER.md, with a line for each experiment that lies there. What stands
on that page above a line that says so is kept.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_siglip.errors import UserError
from dist_siglip.lab.catalogue import EXPERIMENTS, PAPERS
from dist_siglip.lab.experiment import DIFFERS, REPRODUCED, UNPUBLISHED, Outcome, Row
from dist_siglip.system.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WRITTEN = "<!-- Written by dist-siglip lab from here on. -->"


@dataclass(frozen=True, kw_only=True)
class Record:
    """An experiment that was run.

    Attributes:
        name: of the experiment.
        rows: its table.
        notes: what one must know to judge it.
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
        """How many rows have each verdict, whatever its explanation."""
        found = Counter(row.verdict.split(":")[0] for row in self.rows)
        return {name: found[name] for name in (REPRODUCED, "corrected", DIFFERS, UNPUBLISHED)}

    @property
    def is_sound(self) -> bool:
        """Whether no row differs without a reason."""
        return all(row.is_sound for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Return what JSON can hold: nan and infinity are words there."""
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
    write_atomically(folder / f"{name}.svg", _drawn(outcome.figure, name))
    return record


def read_records(folder: Path) -> list[Record]:
    """Read what lies in the folder, in the order of the catalogue.

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
    """Return where the page of a folder lies."""
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


def _drawn(figure: "Figure", name: str) -> bytes:
    """Draw; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=nothing, facecolor="white")
    return buffer.getvalue()
