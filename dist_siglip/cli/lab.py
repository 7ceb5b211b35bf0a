"""``lab``: published experiments on this library's own losses and metrics, and their list."""

import json as json_text
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dist_siglip.cli.parser import run_subcommand
from dist_siglip.lab.experiments import EXPERIMENTS


def list(json: bool = False) -> int:  # noqa: A001 - the name of the subcommand
    """Show the experiments and how long each takes.

    Args:
        json: print JSON instead of a table.
    """
    if json:
        content = {name: entry._asdict() for name, entry in EXPERIMENTS.items()}
        sys.stdout.write(json_text.dumps(content, indent=2) + "\n")
        return 0
    table = Table("experiment", "asks", title="experiments")
    table.add_column("minutes of a core", justify="right")
    for name, entry in EXPERIMENTS.items():
        table.add_row(name, entry.summary, f"{entry.minutes:g}")
    Console().print(table)
    return 0


SUBCOMMANDS = {
    "list": ("dist_siglip.cli.lab", "which experiments there are"),
    "run": ("dist_siglip.cli.lab_run", "some of them"),
    "all": ("dist_siglip.cli.lab_run", "all of them, within 30 minutes on two cores"),
}


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse ``lab SUBCOMMAND ...`` and run the subcommand."""
    return run_subcommand(command, SUBCOMMANDS, arguments)
