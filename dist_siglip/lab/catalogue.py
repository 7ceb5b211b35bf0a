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
    "constructions": Entry(
        "dist_siglip.lab.experiments.constructions",
        "do codes and constructions have the margin they promise?",
        0.1,
    ),
    "five_starts": Entry(
        "dist_siglip.lab.experiments.five_starts",
        "does a relative bias help, and from which start?",
        1.5,
    ),
    "frozen_bias": Entry(
        "dist_siglip.lab.experiments.frozen_bias",
        "does a larger frozen relative bias give a larger margin?",
        2.5,
    ),
    "locked_encoder": Entry(
        "dist_siglip.lab.experiments.locked_encoder",
        "can an encoder be trained against a locked one, with and without adapter?",
        1.0,
    ),
    "modalities": Entry(
        "dist_siglip.lab.experiments.modalities",
        "do one scale and one relative bias serve 2, 4 and 6 modalities?",
        4.0,
    ),
    "clamped_loss": Entry(
        "dist_siglip.lab.experiments.clamped_loss",
        "does a large fixed scale fail, or the logarithm of the published code?",
        3.0,
    ),
    "separator": Entry(
        "dist_siglip.lab.experiments.separator",
        "does every good space have a gap between modalities?",
        0.8,
    ),
    "parity": Entry(
        "dist_siglip.lab.experiments.parity",
        "is the loss of many ranks that of one, with all its gradients?",
        0.5,
    ),
    "minimum_dimension": Entry(
        "dist_siglip.lab.experiments.minimum_dimension",
        "how many dimensions does retrieval of all pairs of documents need?",
        2.5,
    ),
    "critical_documents": Entry(
        "dist_siglip.lab.experiments.critical_documents",
        "for how many documents can d dimensions rank every two first?",
        4.0,
    ),
    "contrastive_gap": Entry(
        "dist_siglip.lab.experiments.contrastive_gap",
        "is there a gap without modalities, and do uniformity and alignment close it?",
        3.5,
    ),
    "siglip_start": Entry(
        "dist_siglip.lab.experiments.siglip_start",
        "which start of scale and bias suits the sigmoid loss?",
        1.0,
    ),
    "batch_size": Entry(
        "dist_siglip.lab.experiments.batch_size",
        "does the sigmoid loss win at small batches?",
        1.0,
    ),
    "closed_forms": Entry(
        "dist_siglip.lab.experiments.closed_forms",
        "do the metrics give the values that follow on paper?",
        0.1,
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
