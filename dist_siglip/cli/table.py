"""The table of an evaluation on a terminal, and what stands beside tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_siglip.errors import UserError
from dist_siglip.metrics.evaluation import describe_num_pairs
from dist_siglip.report.measures import DIRECTIONS
from dist_siglip.runs import RunFolder
from dist_siglip.system.regular_file import read_json

_SINGLES = (
    ("validation loss", "loss", "{:.4f}"),
    ("modality gap (centroid distance)", "modality_gap", "{:.3f}"),
    ("relative modality gap", "relative_modality_gap", "{:.3f}"),
    ("linear separability", "linear_separability", "{:.3f}"),
    ("margin (half gap, strictest pairs)", "margin", "{:.3f}"),
    ("margin (5 % and 95 % quantiles)", "margin_5_95", "{:.3f}"),
    ("relative bias (of the space)", "relative_bias", "{:.3f}"),
    ("relative bias (learned)", "learned_relative_bias", "{:.3f}"),
    ("logit scale", "logit_scale", "{:.2f}"),
    ("logit bias", "logit_bias", "{:.2f}"),
)


def read_evaluation(folder: RunFolder) -> dict[str, float]:
    """Read the numbers of the newest evaluation.

    Raises:
        UserError: if the run has none.
    """
    path = folder.evaluation / "metrics.json"
    if not path.is_file():
        raise UserError(f"run_dir ({folder.path}) has no evaluation; run validate on it first")
    try:
        return {name: float(value) for name, value in read_json(path).items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f"{path} cannot be read ({reason}); run validate on the run") from error


def print_path(label: str, path: Path | str) -> None:
    """Print a path whole, on a line of its own: a table cuts what is wider than the terminal."""
    Console().print(f"{label}: {path}", soft_wrap=True, markup=False, highlight=False)


def print_evaluation(folder: RunFolder, extra: Mapping[str, Any] | None = None) -> None:
    """Print recall, gap, margin and relative bias of the newest evaluation, then ``extra``."""
    metrics = read_evaluation(folder)
    num_pairs, distinct = int(metrics["gallery_pairs"]), int(metrics["distinct_captions"])
    table = Table(title=f"step {int(metrics['step'])}, gallery of {describe_num_pairs(metrics)}")
    for column in ("retrieval", "recall@1", "recall@5", "recall@10", "median rank"):
        table.add_column(column, justify="left" if column == "retrieval" else "right")
    for label, key in DIRECTIONS:
        recalls = [f"{metrics[f'{key}_recall@{k}']:.3f}" for k in (1, 5, 10)]
        table.add_row(label, *recalls, f"{metrics[f'{key}_median_rank']:.0f}")
    pictures = int(metrics.get("distinct_pictures", num_pairs))
    of_pictures = f", {pictures} distinct pictures" if pictures < num_pairs else ""
    table.caption = (
        f"{distinct} distinct captions{of_pictures}; an identical caption counts as a hit; ties "
        f"count against the query; chance of recall@1 is about {1 / num_pairs:.3f}"
    )
    numbers = Table(show_header=False)
    for label, key, form in _SINGLES:
        if key in metrics:
            numbers.add_row(label, form.format(metrics[key]))
    for label, value in (extra or {}).items():
        numbers.add_row(label, str(value))
    console = Console()
    console.print(table)
    console.print(numbers)
