"""``report``: one page about a run, or about several side by side."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.parser import CommandParser
from dist_siglip.errors import UserError
from dist_siglip.report import write_report
from dist_siglip.report.history import printable

_SEVERAL = "report.html"


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``report`` and run it."""
    set_up_logging()
    given = parser(command).parse_args(list(arguments))
    return report(given.runs, given.out)


def parser(command: str) -> CommandParser:
    """Return the parser of the options."""
    made = CommandParser(prog=f"dist-siglip {command}", description=report.__doc__)
    # Words, not a JSON list: shells expand runs/*.
    made.add_argument(
        "runs",
        nargs="+",
        type=str,
        metavar="RUN",
        help="Folder of a run; several for a comparison. Folders of embeddings are taken, too.",
    )
    made.add_argument(
        "--out",
        type=str,
        help="File to write. By default RUN/report.html of one run, report.html here of several.",
    )
    return made


def report(runs: list[str], out: str | None) -> int:
    """Write one self-contained HTML page about runs: curves, retrieval, geometry, conclusions.

    Reads files only, and executes nothing in them; works while a run is going on.
    """
    page = Path(out or _SEVERAL) if out or len(runs) > 1 else None
    try:
        written = write_report(*map(Path, runs), out=page)
    except OSError as error:
        raise UserError(
            f"out ({page or 'report.html of the run'}) cannot be written "
            f"({error.strerror or error}); name another file with --out"
        ) from error
    sys.stdout.write(f"wrote {printable(str(written))}\n")
    return 0
