"""Experiments, one per module with a function ``run`` from ``LabSettings`` to ``Outcome``."""

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
        paper: whose numbers they are, a name in ``PAPERS``.
    """

    module: str
    summary: str
    minutes: float
    paper: str


def _arxiv(number: str) -> str:
    return f"([arXiv:{number}](https://arxiv.org/abs/{number}))"


# Name of a page -> its heading and what the page is of, in the order of the lab.
PAPERS: dict[str, tuple[str, str]] = {
    "constellations": ("Constellations", f"Bangachev et al. 2025 {_arxiv('2509.18552')}."),
    "siglip": ("SigLIP", f"Zhai et al. 2023 {_arxiv('2303.15343')}."),
    "siglip2": (
        "SigLIP 2",
        f"Tschannen et al. 2025 {_arxiv('2502.14786')}, who compare the whole, not its parts.",
    ),
    "subset_retrieval": (
        "Retrieval of sets of documents",
        f"Bangachev et al. 2026 {_arxiv('2605.23556')}.",
    ),
    "embedding_limits": (
        "Limits of single-vector retrieval",
        f"Weller et al. 2025 {_arxiv('2508.21038')}.",
    ),
    "modality_gap": ("The contrastive gap", f"Fahim et al. 2024 {_arxiv('2405.18570')}."),
    "metrics": (
        "Metrics in closed form",
        "Values that follow on paper from the definitions of the metrics.",
    ),
}

# Name -> experiment, in the order of the page.
EXPERIMENTS: dict[str, Entry] = {
    "constructions": Entry(
        "dist_siglip.lab.experiments.constructions",
        "do codes and constructions have the margin they promise?",
        0.1,
        "constellations",
    ),
    "five_starts": Entry(
        "dist_siglip.lab.experiments.five_starts",
        "does a relative bias help, and from which start?",
        1.5,
        "constellations",
    ),
    "frozen_bias": Entry(
        "dist_siglip.lab.experiments.frozen_bias",
        "does a larger frozen relative bias give a larger margin?",
        2.5,
        "constellations",
    ),
    "locked_encoder": Entry(
        "dist_siglip.lab.experiments.locked_encoder",
        "can an encoder be trained against a locked one, with and without adapter?",
        1.0,
        "constellations",
    ),
    "modalities": Entry(
        "dist_siglip.lab.experiments.modalities",
        "do one scale and one relative bias serve 2, 4 and 6 modalities?",
        4.0,
        "constellations",
    ),
    "clamped_loss": Entry(
        "dist_siglip.lab.experiments.clamped_loss",
        "does a large fixed scale fail, or the logarithm of the published code?",
        3.0,
        "constellations",
    ),
    "separator": Entry(
        "dist_siglip.lab.experiments.separator",
        "does every good space have a gap between modalities?",
        0.8,
        "constellations",
    ),
    "parity": Entry(
        "dist_siglip.lab.experiments.parity",
        "is the loss of many ranks that of one, with all its gradients?",
        0.5,
        "siglip",
    ),
    "minimum_dimension": Entry(
        "dist_siglip.lab.experiments.minimum_dimension",
        "how many dimensions does retrieval of all pairs of documents need?",
        2.5,
        "subset_retrieval",
    ),
    "critical_documents": Entry(
        "dist_siglip.lab.experiments.critical_documents",
        "for how many documents can d dimensions rank every two first?",
        4.0,
        "embedding_limits",
    ),
    "contrastive_gap": Entry(
        "dist_siglip.lab.experiments.contrastive_gap",
        "is there a gap without modalities, and do uniformity and alignment close it?",
        3.5,
        "modality_gap",
    ),
    "siglip_start": Entry(
        "dist_siglip.lab.experiments.siglip_start",
        "which start of scale and bias suits the sigmoid loss?",
        1.0,
        "siglip",
    ),
    "batch_size": Entry(
        "dist_siglip.lab.experiments.batch_size",
        "does the sigmoid loss win at small batches?",
        1.0,
        "siglip",
    ),
    "siglip2_parts": Entry(
        "dist_siglip.lab.experiments.siglip2_parts",
        "what do captions, boxes, prefixes and a teacher change beside the sigmoid loss?",
        27.0,
        "siglip2",
    ),
    "closed_forms": Entry(
        "dist_siglip.lab.experiments.closed_forms",
        "do the metrics give the values that follow on paper?",
        0.1,
        "metrics",
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
    """Raise for a name that no experiment has."""
    for name in names:
        if name not in EXPERIMENTS:
            near = get_close_matches(name, EXPERIMENTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(EXPERIMENTS)}"
            raise UserError(f"there is no experiment {name!r}; {hint}")
