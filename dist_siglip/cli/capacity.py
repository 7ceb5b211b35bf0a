"""``capacity``: do so many pairs fit into so many dimensions at a margin, and what bounds say."""

import json as json_text
import math
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dist_siglip.cli.parser import CommandParser, call, parser_of_function
from dist_siglip.cli.table import read_evaluation
from dist_siglip.errors import UserError
from dist_siglip.metrics import (
    capacity_alpha,
    find_capacity_problem,
    largest_margin,
    largest_pairs,
    margin_of_dimension,
    required_dimension,
    subset_dimension,
)
from dist_siglip.metrics.prefixes import PREFIX_WAYS
from dist_siglip.report.measures import DIRECTIONS
from dist_siglip.report.sections.capacity import measured_prefixes
from dist_siglip.runs import RunFolder
from dist_siglip.system.regular_file import open_regular

# Margins of an evaluation: what each is called, and the end of its name.
_MARGINS = (
    ("every pair", ""),
    ("5 % of each kind left aside", "_5_95"),
    ("means", "_of_means"),
)
_LABELS = {
    "alpha": "alpha of the code behind it",
    "feasible": "feasible (Theorem 3.4)",
    "largest_margin": "largest margin at this bias",
    "dimensions_exact": "dimensions: never fewer than",
    "dimensions_necessary": "dimensions: necessary *",
    "dimensions_sufficient": "dimensions: enough *",
    "log10_pairs_reached": "pairs that fit: at least *",
    "log10_pairs_bound": "pairs that fit: at most *",
    "margin_reached": "margin: reached *",
    "margin_bound": "margin: at most *",
}


# What was measured at each prefix, cut and rotated.
_Prefixes = dict[int, dict[str, dict[str, float | bool | str]]]


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``capacity`` and run it."""
    return call(capacity, parser(command), arguments)


def parser(command: str) -> CommandParser:
    """Return the parser of the options: the signature of ``capacity``."""
    return parser_of_function(command, capacity)


def capacity(
    *,
    run_dir: str | None = None,
    pairs: float | None = None,
    dimension: int | None = None,
    margin: float | None = None,
    relative_bias: float | None = None,
    compare: str | None = None,
    json: bool = False,
) -> int:
    """Say what bounds allow a number of pairs, a dimension, a margin and a relative bias.

    Give all four, or a run, whose newest evaluation has them; what is given counts before what the
    run says. Lines with * hold for large dimensions (the exponent); the others hold as they are.

    Args:
        run_dir: folder of a run that was evaluated.
        pairs: number of pairs, like 1e9; by default those of the run's evaluation.
        dimension: of the embeddings.
        margin: half the gap between positive and negative cosines.
        relative_bias: threshold between them, -logit_bias / logit_scale.
        compare: folder of another run, whose prefixes stand beside those of run_dir: of the same
            model, trained at prefixes or not.
        json: print JSON instead of a table.
    """
    configurations: dict[str, tuple[float, float]] = {}
    metrics: dict[str, float] = {}
    if run_dir is not None:
        folder = RunFolder(Path(run_dir))
        metrics = read_evaluation(folder)
        pairs = metrics["gallery_pairs"] if pairs is None else pairs
        dimension = _dimension_of(folder) if dimension is None else dimension
    if margin is not None and relative_bias is not None:
        configurations["given"] = (margin, relative_bias)
    elif margin is not None or relative_bias is not None:
        raise UserError("margin and relative_bias are given together, like 0.07 and 0.03")
    else:
        configurations = _configurations_of(metrics)
    if pairs is None or dimension is None or not configurations:
        raise UserError(
            "give pairs, dimension, margin and relative_bias, like --pairs 1e9 --dimension 768 "
            "--margin 0.07 --relative_bias 0.03, or the run_dir of a run that was evaluated"
        )
    found = {
        name: describe_capacity(pairs, dimension, *values)
        for name, values in configurations.items()
    }
    guaranteed = metrics.get("guaranteed_recall@1", math.nan)
    prefixes = {dim: _of_prefix(pairs, dim, metrics) for dim in measured_prefixes(metrics)}
    by_run = {"" if run_dir is None else run_dir: prefixes}
    if compare is not None:
        if run_dir is None:
            raise UserError(f"compare ({compare}) stands beside run_dir, which is not given")
        other = read_evaluation(RunFolder(Path(compare)))
        for name in ("gallery_pairs", "step"):
            if other.get(name) != metrics.get(name):
                raise UserError(
                    f"compare ({compare}) was evaluated with {name} {other.get(name)}, run_dir "
                    f"with {metrics.get(name)}; validate both on the same pairs after as many steps"
                )
        by_run[compare] = {dim: _of_prefix(pairs, dim, other) for dim in measured_prefixes(other)}
    if json:
        document: dict[str, Any] = {"pairs": pairs, "dimension": dimension, "margins": found}
        if prefixes:
            document["prefixes"] = prefixes
        if compare is not None:
            document["compare"] = by_run[compare]
        if math.isfinite(guaranteed):
            document["guaranteed_recall@1"] = guaranteed
        sys.stdout.write(json_text.dumps(document, indent=2) + "\n")
        return 0
    console = Console()
    console.print(_table(pairs, dimension, found))
    console.print("* to first order of the exponent; in few dimensions more pairs fit")
    for name, numbers in found.items():
        console.print(_sentence(name, dimension, numbers))
    if any(by_run.values()):
        console.print(_table_of_prefixes(by_run))
    if math.isfinite(guaranteed):
        measured = min(metrics[f"{way}_recall@1"] for way in ("image_to_text", "text_to_image"))
        console.print(
            f"the loss alone guarantees recall@1 of {guaranteed:.3f}"
            + (" (nothing)" if guaranteed == 0 else "")
            + f"; measured: {measured:.3f}"
        )
    return 0


def describe_capacity(
    pairs: float, dimension: int, margin: float, relative_bias: float
) -> dict[str, float | bool | str]:
    """Everything the bounds say about one configuration.

    Args:
        pairs: N, finite and at least 2.
        dimension: d, at least 1.
        margin: half gap, any number: one that cannot be is an answer, not an error.
        relative_bias: threshold.

    Returns:
        Names of ``_LABELS`` to numbers, those that do not exist left out; ``margin`` and
        ``relative_bias``; ``problem`` if the margin cannot be, or no dimension follows from it.

    Raises:
        UserError: if pairs, dimension or relative bias is out of range.
    """
    margins = margin_of_dimension(pairs, dimension, relative_bias)
    problem = find_capacity_problem(margin, relative_bias, pairs)
    facts: dict[str, float | bool | str] = {
        "margin": margin,
        "relative_bias": relative_bias,
        "largest_margin": largest_margin(relative_bias, pairs),
        "margin_reached": margins[0],
        "margin_bound": margins[1],
    }
    if margin > 0:
        facts["feasible"] = problem is None
    if problem is None:
        facts["alpha"] = capacity_alpha(margin, relative_bias)
        facts["dimensions_exact"] = subset_dimension(int(pairs), 1, margin)
        if capacity_alpha(margin, relative_bias) <= 0:
            problem = (
                f"margin ({margin:.4g}) at relative bias {relative_bias:.4g} is one that only few "
                f"pairs can have; below {(1 + relative_bias) / 3:.4g} they grow exponentially with "
                "the dimension"
            )
    if problem is not None:
        return facts | {"problem": problem}
    needed = required_dimension(pairs, margin, relative_bias)
    fit = largest_pairs(dimension, margin, relative_bias)
    return facts | {
        "dimensions_necessary": needed.necessary,
        "dimensions_sufficient": needed.sufficient,
        "log10_pairs_reached": fit.log10_reached,
        "log10_pairs_bound": fit.log10_bound,
    }


def _of_prefix(
    pairs: float, dimension: int, metrics: Mapping[str, float]
) -> dict[str, dict[str, float | bool | str]]:
    """What was measured at a prefix, cut and rotated, and what bounds say of its margin."""
    found = {}
    for way in PREFIX_WAYS:
        begin = f"{way}_{dimension}_"
        names = ("image_to_text_recall@1", "text_to_image_recall@1", "modality_gap")
        facts: dict[str, float | bool | str] = {name: metrics[begin + name] for name in names}
        # As in the table above, without the worst 5 % where pairs overlap.
        suffix = "" if metrics[f"{begin}margin"] > 0 else "_5_95"
        margin, bias = (metrics[f"{begin}{name}{suffix}"] for name in ("margin", "relative_bias"))
        if math.isfinite(margin) and math.isfinite(bias):
            facts |= describe_capacity(pairs, dimension, margin, max(-1, min(1, bias)))
        found[way] = facts
    return found


def _table_of_prefixes(by_run: dict[str, _Prefixes]) -> Table:
    table = Table(title="in fewer dimensions (pca: rotated, fitted to the evaluated pictures)")
    columns = ("dimensions", "way", "recall@1", "", "margin", "gap", "pairs that fit: at most *")
    for heading in (*columns[:1], *(["run"] if len(by_run) > 1 else []), *columns[1:]):
        table.add_column(heading, justify="left" if heading in ("run", "way") else "right")
    for dim in sorted({dim for prefixes in by_run.values() for dim in prefixes}, reverse=True):
        for run, prefixes in by_run.items():
            whose = [Path(run).name] if len(by_run) > 1 else []
            for way, facts in prefixes.get(dim, {}).items():
                numbers = [facts.get(f"{each}_recall@1") for _, each in DIRECTIONS]
                numbers += [facts.get("margin"), facts.get("modality_gap")]
                cells = [_show("", number) for number in numbers]
                bound = _show("log10", facts.get("log10_pairs_bound"))
                table.add_row(f"{dim:,}", *whose, way, *cells, bound)
    return table


def _configurations_of(metrics: dict[str, float]) -> dict[str, tuple[float, float]]:
    return {
        # Cosines of rounded features may pass 1 by a rounding.
        name: (metrics[f"margin{suffix}"], max(-1, min(1, metrics[f"relative_bias{suffix}"])))
        for name, suffix in _MARGINS
        if math.isfinite(metrics.get(f"margin{suffix}", math.nan))
    }


def _dimension_of(folder: RunFolder) -> int:
    path = folder.evaluation / "arrays.npz"
    if not path.is_file():
        raise UserError(f"run_dir ({folder.path}) has no {path.name}; give --dimension")
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            return int(arrays["image_features"].shape[1])
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); give --dimension") from error


def _table(pairs: float, dimension: int, found: dict[str, dict[str, float | bool | str]]) -> Table:
    table = Table(title=f"{pairs:,.0f} pairs, {dimension} dimensions")
    table.add_column("")
    for name, facts in found.items():
        table.add_column(
            f"{name}\nmargin {facts['margin']:.4g}\nrelative bias {facts['relative_bias']:.4g}",
            justify="right",
        )
    for key, label in _LABELS.items():
        table.add_row(label, *(_show(key, facts.get(key)) for facts in found.values()))
    return table


def _show(key: str, value: float | bool | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"10^{value:.1f}" if key.startswith("log10") else f"{value:.4g}"


def _sentence(name: str, dimension: int, facts: dict[str, float | bool | str]) -> str:
    if "problem" in facts:
        return f"{name}: {facts['problem']}"
    return (
        f"{name}: at d = {dimension} the bound allows {_show('log10', facts['log10_pairs_bound'])} "
        f"pairs at margin {facts['margin']:.4g}, and a construction reaches "
        f"{_show('log10', facts['log10_pairs_reached'])}"
    )
