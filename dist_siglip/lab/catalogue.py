"""Which experiments are there?"""

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

from dist_siglip.errors import UserError
from dist_siglip.lab.experiment import LabSettings, Outcome


class Entry(NamedTuple):
    """One experiment.

    Attributes:
        module: has the function ``run``; imported when the experiment is run.
        summary: what is asked, in one line.
        minutes: of one CPU core, for the whole experiment; the longest start first.
    """

    module: str
    summary: str
    minutes: float


# Name -> experiment, in the order of the page.
EXPERIMENTS: dict[str, Entry] = {
    "five_starts": Entry(
        "dist_siglip.lab.experiments.five_starts",
        "does a relative bias help, and from which start?",
        2.0,
    ),
}


def function_of(name: str) -> Callable[[LabSettings], Outcome]:
    """Import an experiment.

    Raises:
        UserError: if there is none of this name.
    """
    check_names([name])
    run: Callable[[LabSettings], Outcome] = importlib.import_module(EXPERIMENTS[name].module).run
    return run


def check_names(names: list[str]) -> None:
    """Refuse names that no experiment has.

    Raises:
        UserError: names the first one.
    """
    for name in names:
        if name not in EXPERIMENTS:
            near = get_close_matches(name, EXPERIMENTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(EXPERIMENTS)}"
            raise UserError(f"there is no experiment {name!r}; {hint}")
