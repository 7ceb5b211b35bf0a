"""``lab run`` and ``lab all``: run experiments, show how far they are and what came out."""

import json as json_text
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.progress import TimeElapsedColumn as ElapsedColumn
from rich.table import Table
from rich.text import Text

from dist_siglip.cli.table import print_path
from dist_siglip.lab.experiments import EXPERIMENTS
from dist_siglip.lab.running import LabRun, Record, cells_of, run_experiments, write_page

logger = logging.getLogger(__name__)

_LINE_SECONDS = 30.0


def run(
    names: str | list[str],
    out: str = "runs/lab",
    quick: bool = False,
    seed: int = 0,
    workers: int = 2,
    json: bool = False,
) -> int:
    """Run experiments and compare with what was published; exit code 1 if a number differs.

    Args:
        names: of an experiment, or a JSON list of names.
        out: folder of the results, NAME.json and NAME.svg, with a page for each paper; the list of
            all is beside it, OUT.md.
        quick: fewer cases of each.
        seed: added to the seeds the authors used; 0 repeats theirs.
        workers: processes at a time, of one thread each.
        json: print JSON instead of tables.
    """
    chosen = [names] if isinstance(names, str) else names
    return _run(LabRun(chosen, Path(out), quick, seed), workers, json)


def all(  # noqa: A001 - the name of the subcommand
    out: str = "runs/lab",
    quick: bool = False,
    seed: int = 0,
    workers: int = 2,
    json: bool = False,
) -> int:
    """Run every experiment; exit code 1 if a number differs.

    Args:
        out: folder of the results, NAME.json and NAME.svg, with a page for each paper; the list of
            all is beside it, OUT.md.
        quick: fewer cases of each.
        seed: added to the seeds the authors used; 0 repeats theirs.
        workers: processes at a time, of one thread each.
        json: print JSON instead of tables.
    """
    return _run(LabRun([*EXPERIMENTS], Path(out), quick, seed), workers, json)


def _run(order: LabRun, workers: int, as_json: bool) -> int:
    records = []
    with _progress(len(order.names)) as show:
        for record in run_experiments(order, workers=workers, on_progress=show):
            counts = ", ".join(f"{count} {name}" for name, count in record.counts.items() if count)
            logger.info("%s: %s; %.0f CPU seconds", record.name, counts, record.cpu_seconds)
            records.append(record)
    page = write_page(order.out)
    if as_json:
        sys.stdout.write(json_text.dumps([record.as_json() for record in records], indent=2) + "\n")
    else:
        for record in records:
            _print(record)
        print_path("page", page)
    return int(any(not record.is_sound for record in records))


def _print(record: Record) -> None:
    table = Table(title=record.name)
    for heading in ("quantity", "published", "ours", "tolerance", "verdict"):
        left = heading in ("quantity", "verdict")
        table.add_column(heading, justify="left" if left else "right")
    for row in record.rows:
        table.add_row(*map(Text, cells_of(row)))
    console = Console()
    console.print(table)
    for note in record.notes:
        console.print(f"- {note}", soft_wrap=True, markup=False, highlight=False)


class _Show(Protocol):
    def __call__(self, name: str, done: float) -> None: ...


@contextmanager
def _progress(num_experiments: int) -> Iterator[_Show]:
    """Draw a bar for all and one for each that runs; without a terminal write a line at times."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), ElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        everything = bars.add_task("all", total=num_experiments)
        tasks: dict[str, TaskID] = {}
        shares: dict[str, float] = {}
        last_line = time.monotonic()

        def show(name: str, done: float) -> None:
            nonlocal last_line
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0)
            shares[name] = done
            bars.update(tasks[name], completed=done, visible=done < 1)
            bars.update(everything, completed=sum(shares.values()))
            if bars.disable and time.monotonic() - last_line > _LINE_SECONDS:
                last_line = time.monotonic()
                running = ", ".join(f"{n} {s:.0%}" for n, s in shares.items() if s < 1)
                logger.info("%.1f of %d done; %s", sum(shares.values()), num_experiments, running)

        yield show
