"""Which of several runs is the best, and is that more than noise?"""

import math
from collections.abc import Sequence

from dist_siglip.report.measures import DIRECTIONS, Measure, known, table_of
from dist_siglip.report.page import render_card, render_columns
from dist_siglip.report.records import RunRecord
from dist_siglip.report.section import Section
from dist_siglip.report.verdict import Verdict

_ERRORS = 2.0  # standard errors of a difference, below which it is taken for noise
_MEASURES = (
    *(Measure(f"{key}_recall@1", f"recall@1, {label}", "") for label, key in DIRECTIONS),
    Measure("loss", "validation loss", ""),
    Measure("margin_5_95", "margin without the worst 5 %", ""),
    Measure("modality_gap", "modality gap", ""),
)


def make(runs: Sequence[RunRecord]) -> Section | None:
    """Set the most asked numbers side by side; None for a single run."""
    if len(runs) < 2:
        return None
    table = table_of(runs, _MEASURES)
    parts = [render_columns([render_card("Side by side", table)])] if table else []
    best, verdict = judge(runs)
    return Section("comparison", "Comparison", [(best, verdict)], parts)


def judge(runs: Sequence[RunRecord]) -> tuple[RunRecord, Verdict]:
    """Find the run of the highest recall@1, the mean of both directions."""
    found = {run.name: recall for run in runs if (recall := mean_recall(run)) is not None}
    if len(found) < 2:
        text = "Fewer than two of these runs have an evaluation of retrieval."
        return runs[0], Verdict("unknown", text)
    ordered = sorted(
        (run for run in runs if run.name in found), key=lambda run: -found[run.name][0]
    )
    best, second = ordered[:2]
    (highest, first_error), (next_highest, second_error) = found[best.name], found[second.name]
    difference = highest - next_highest
    error = math.hypot(first_error, second_error)
    told = f"Mean recall@1 {highest:.3f}, then {next_highest:.3f} of {second.name}"
    pairs = {run.metrics.get("gallery_pairs") for run in ordered}
    if len(pairs) > 1:
        return best, Verdict(
            "watch",
            f"{best.name} has the highest recall@1, but not among as many pairs as the others.",
            f"{told}. The fewer pairs, the easier: evaluate all runs on the same pairs.",
        )
    if difference <= _ERRORS * error:
        return best, Verdict(
            "note",
            f"{best.name} has the highest recall@1, within noise of {second.name}.",
            f"{told}: a difference of {difference:.3f}, with a standard error of {error:.3f}.",
        )
    return best, Verdict(
        "good",
        f"{best.name} has the highest recall@1, beyond noise.",
        f"{told}: a difference of {difference:.3f}, with a standard error of {error:.3f}. What "
        "differs in their settings stands at the end.",
    )


def mean_recall(run: RunRecord) -> tuple[float, float] | None:
    """Mean recall@1 of both directions and its standard error; None without an evaluation.

    The directions are taken for one measurement: their queries are the same pairs.
    """
    found = known(run.metrics, *(f"{key}_recall@1" for _, key in DIRECTIONS), "gallery_pairs")
    if found is None or found[2] < 1:
        return None
    recall = (found[0] + found[1]) / 2
    return recall, math.sqrt(recall * (1 - recall) / found[2])
