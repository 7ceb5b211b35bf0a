"""The number of pairs that fit at the margin of the space, and what fewer dimensions keep."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dist_siglip.errors import UserError
from dist_siglip.metrics.capacity import (
    LargestPairs,
    RequiredDimension,
    find_capacity_problem,
    largest_margin,
    largest_pairs,
    margin_of_dimension,
    required_dimension,
)
from dist_siglip.report.measures import DIRECTIONS, known, show
from dist_siglip.report.page import (
    Section,
    Verdict,
    columns_of,
    judge_each,
    render_columns,
    render_table_card,
)
from dist_siglip.report.records import RunRecord
from dist_siglip.report.sections.comparison import data_differences, mean_recall

_NEAR = 0.8  # of the largest margin
_KEPT = 0.95  # of the recall of whole features
_ERRORS = 2.0  # standard errors of a difference, below which it is taken for noise
_PREFIX_NAME = re.compile(r"prefix_(\d{1,9})_margin")


class Room(NamedTuple):
    """What bounds say about a run.

    Attributes:
        dimension: of its embedding.
        num_pairs: it was trained on, as far as its log tells; else those of its evaluation.
        margin: it has.
        relative_bias: it has.
        is_lenient: whether both leave out the worst 5 % of each kind of pairs.
        limit: largest margin at this relative bias in any dimension.
        reached: margin that a construction has with so many pairs in so many dimensions.
        bound: margin that nothing exceeds there.
        needed: dimensions for so many pairs at its margin; None where that is not known.
        pairs: that fit into its dimension at its margin; None where that is not known.
        problem: why not.
    """

    dimension: int
    num_pairs: float
    margin: float
    relative_bias: float
    is_lenient: bool
    limit: float
    reached: float
    bound: float
    needed: RequiredDimension | None
    pairs: LargestPairs | None
    problem: str | None


def make(runs: Sequence[RunRecord]) -> Section:
    """List what the bounds of Bangachev et al. say about each run."""
    found = [room(run) for run in runs]
    rows: list[list[str]] = [
        ["dimensions of the embedding", *(_cell(r, lambda r: f"{r.dimension:,}") for r in found)],
        [
            "pairs\nof the training data as far as the log tells, else of the evaluation",
            *(_cell(r, lambda r: f"{r.num_pairs:,.0f}") for r in found),
        ],
        [
            "margin and relative bias\nwithout the worst 5 % where the margin of all is below 0",
            *(_cell(r, lambda r: f"{r.margin:.3f}, {r.relative_bias:.3f}") for r in found),
        ],
        [
            "largest margin at this relative bias\nin any dimension (Theorem 3.4)",
            *(_cell(r, lambda r: show(r.limit)) for r in found),
        ],
        [
            "largest margin in these dimensions\na construction reaches, nothing exceeds",
            *(_cell(r, lambda r: f"{r.reached:.3f}, {r.bound:.3f}") for r in found),
        ],
        [
            "dimensions for these pairs at this margin\ntoo few below, enough from",
            *(_cell(r, _needed) for r in found),
        ],
        [
            "pairs that fit at this margin\na construction has, nothing has more",
            *(_cell(r, _pairs) for r in found),
        ],
    ]
    note = (
        "Bangachev et al. 2025, Theorems 3.3 to 3.5. All but Theorem 3.4 hold to first order as "
        "the dimension grows; in few dimensions more pairs fit than they say."
    )
    cards = [render_table_card("In numbers", columns_of(runs), rows, note=note)]
    shorter = _fewer_dimensions(runs)
    parts = [render_columns(cards + ([shorter] if shorter else []))]
    verdicts = judge_each(runs, judge, judge_prefixes)
    compared = compare_prefixes(runs)
    return Section("capacity", "Capacity", verdicts + ([compared] if compared else []), parts)


def measured_prefixes(metrics: Mapping[str, float]) -> list[int]:
    """List the prefixes that an evaluation measured, largest first.

    Example:
        >>> measured_prefixes({"prefix_8_margin": 0.1, "prefix_64_margin": 0.2, "margin": 0.3})
        [64, 8]
    """
    found = (_PREFIX_NAME.fullmatch(name) for name in metrics)
    return sorted({int(match[1]) for match in found if match}, reverse=True)


def trained_prefixes(settings: Mapping[str, object]) -> list[int]:
    """List the prefixes that the loss of a run was computed at, from its settings."""
    for name in ("model.loss", "model.loss.init_args.base"):
        dims = settings.get(f"{name}.init_args.dims")
        if str(settings.get(f"{name}.class_path", "")).endswith("MatryoshkaLoss"):
            return [dim for dim in dims if isinstance(dim, int)] if isinstance(dims, list) else []
    return []


def judge_prefixes(run: RunRecord) -> Verdict | None:
    """Say how few dimensions keep the recall of all, by either way; None if none was measured."""
    dims, whole = measured_prefixes(run.metrics), _mean_recall(run, "")
    if not dims or whole is None:
        return None
    told, kept = [], {}
    for way, name in (("prefix", "cut"), ("pca", "rotated by PCA")):
        enough = [
            dim
            for dim in dims
            if (recall := _mean_recall(run, f"{way}_{dim}_")) is not None
            and recall >= _KEPT * whole
        ]
        kept[way] = min(enough, default=None)
        told.append(f"{name}: {kept[way] if enough else 'none of these'}")
    text = f"Dimensions that keep {_KEPT:.0%} of recall@1: {', '.join(told)}."
    trained = trained_prefixes(run.settings)
    how = (
        f"Trained at prefixes {', '.join(map(str, trained))}."
        if trained
        else ("Not trained at prefixes: MatryoshkaLoss would be.")
    )
    return Verdict("note", text, f"{how} The rotation was fitted to these pictures.")


def compare_prefixes(runs: Sequence[RunRecord]) -> tuple[RunRecord, Verdict] | None:
    """Compare the first run trained at prefixes with the first that was not, cut and rotated.

    The smallest trained prefix that both measured counts. A difference within two standard errors
    of the two recalls is noise. None without a run of each kind.
    """
    evaluated = [run for run in runs if mean_recall(run) is not None]
    nested = next((run for run in evaluated if trained_prefixes(run.settings)), None)
    plain = next((run for run in evaluated if not trained_prefixes(run.settings)), None)
    if nested is None or plain is None:
        return None
    dims = [
        dim
        for dim in measured_prefixes(nested.metrics)
        if dim in trained_prefixes(nested.settings) and dim in measured_prefixes(plain.metrics)
    ]
    if not dims:
        asked = ", ".join(map(str, trained_prefixes(nested.settings)))
        return nested, Verdict(
            "unknown",
            f"{plain.name} was not measured at a prefix that {nested.name} was trained at.",
            f"Measure it: dist-siglip validate with model.prefix_dims: [{asked}].",
        )
    reasons = data_differences([plain, nested])
    steps = {run.name: run.metrics.get("step") for run in (plain, nested)}
    if len(set(steps.values())) > 1:
        told = ", ".join(f"{name} {show(step, '{:,.0f}')}" for name, step in steps.items())
        reasons.append(f"steps of training ({told})")
    if reasons:
        text = f"Prefixes of {plain.name} and {nested.name} cannot be compared."
        return nested, Verdict("watch", text, f"They differ in {'; '.join(reasons)}.")
    dim = dims[-1]
    found = [_mean_recall(plain, begin) for begin in ("", f"prefix_{dim}_", f"pca_{dim}_")]
    whole, cut, rotated, trained = (*found, _mean_recall(nested, f"prefix_{dim}_"))
    if whole is None or cut is None or rotated is None or trained is None:
        return None
    spread = trained * (1 - trained) + rotated * (1 - rotated)
    error = math.sqrt(spread / nested.metrics["gallery_pairs"])
    reason = (
        f"Mean recall@1 at {dim} dimensions: {plain.name} cut {cut:.3f}, rotated by PCA "
        f"{rotated:.3f}, whole {whole:.3f}; {nested.name}, trained at prefixes, {trained:.3f}; "
        f"standard error of a difference {error:.3f}. The rotation was fitted to these pictures."
    )
    difference = trained - rotated
    if difference > _ERRORS * error:
        return nested, Verdict("good", "Training at prefixes keeps more than the rotation.", reason)
    if difference < -_ERRORS * error:
        return nested, Verdict(
            "watch", "The rotation keeps more than training at prefixes, for nothing.", reason
        )
    return nested, Verdict(
        "note", "Within noise, the rotation keeps what training at prefixes keeps.", reason
    )


def _fewer_dimensions(runs: Sequence[RunRecord]) -> str:
    """Table of cut, rotated and trained prefixes side by side; "" if no run measured any."""
    dims = sorted({dim for run in runs for dim in measured_prefixes(run.metrics)}, reverse=True)
    if not dims:
        return ""
    columns, rows = ["dimensions"], [["all"], *([str(dim)] for dim in dims)]
    for run in runs:
        whose = f"{run.name}: " if len(runs) > 1 else ""
        trained = trained_prefixes(run.settings)
        for way, name in (("prefix", "Matryoshka" if trained else "plain cut"), ("pca", "PCA")):
            columns.append(whose + name)
            for row, begin in zip(rows, ("", *(f"{way}_{dim}_" for dim in dims)), strict=True):
                extra = trained and way == "prefix" and begin and int(row[0]) not in trained
                row.append(_prefix_cell(run, begin) + (" (not trained)" if extra else ""))
    note = (
        "Mean recall@1 of both directions; below it margin without the worst 5 %, and modality gap."
        " PCA: rotated along the second moment of the pictures evaluated, without training; fitted "
        "to few pictures it looks better than it is. A report of a run with and one without "
        "MatryoshkaLoss has plain cut, PCA and Matryoshka side by side."
    )
    return render_table_card("In fewer dimensions", columns, rows, note=note)


def _prefix_cell(run: RunRecord, begin: str) -> str:
    recall, metrics = _mean_recall(run, begin), run.metrics
    margin, gap = (show(metrics.get(begin + name)) for name in ("margin_5_95", "modality_gap"))
    return f"{show(recall)}\nmargin {margin}, gap {gap}"


def _mean_recall(run: RunRecord, begin: str) -> float | None:
    found = known(run.metrics, *(f"{begin}{key}_recall@1" for _, key in DIRECTIONS))
    return None if found is None else sum(found) / len(found)


def judge(run: RunRecord) -> Verdict:
    """Say whether the dimension limits the run."""
    found = room(run)
    if found is None:
        return Verdict("unknown", "The run has no evaluation with margins and features.")
    if found.pairs is None or found.needed is None:
        return Verdict("unknown", "No number of pairs follows from its margin.", _why(found))
    lenient = " without the worst 5 % of the pairs" if found.is_lenient else ""
    told = (
        f"At d = {found.dimension} and its margin of {found.margin:.3f}{lenient} the bounds allow "
        f"between 10^{found.pairs.log10_reached:.0f} and 10^{found.pairs.log10_bound:.0f} pairs"
    )
    needed = (
        f"Its {found.num_pairs:,.0f} pairs need at least {found.needed.necessary} dimensions at "
        f"this margin, and {found.needed.sufficient} are enough, to first order."
    )
    if found.dimension >= found.needed.sufficient:
        near = found.margin >= _NEAR * found.bound
        more = "" if near else f" The same pairs could have a margin of {found.reached:.3f}."
        return Verdict("good", f"The dimension does not limit this run. {told}.", needed + more)
    if found.dimension >= found.needed.necessary:
        return Verdict("note", f"The dimension is just about enough. {told}.", needed)
    return Verdict(
        "watch",
        f"The space is full at this margin. {told}.",
        f"{needed} More pairs at this margin ask for more dimensions, or for a smaller margin.",
    )


def room(run: RunRecord) -> Room | None:
    """Ask the bounds about the newest evaluation; None if it has no margin or no features."""
    if run.features is None:
        return None
    strict = known(run.metrics, "margin", "relative_bias")
    lenient = known(run.metrics, "margin_5_95", "relative_bias_5_95")
    is_lenient = strict is None or (strict[0] <= 0 and lenient is not None)
    chosen = lenient if is_lenient else strict
    if chosen is None:
        return None
    margin, bias = chosen
    dimension, num_pairs = run.features[0].shape[1], max(2.0, _num_pairs(run))
    bias = min(1.0, max(-1.0, bias))
    needed, pairs, problem = None, None, find_capacity_problem(margin, bias)
    if problem is None:
        try:
            pairs = largest_pairs(dimension, margin, bias)
            needed = required_dimension(num_pairs, margin, bias)
        except UserError as error:
            problem = str(error)
    return Room(
        dimension,
        num_pairs,
        margin,
        bias,
        is_lenient,
        largest_margin(bias, num_pairs),
        *margin_of_dimension(num_pairs, dimension, bias),
        needed,
        pairs,
        problem,
    )


def _cell(found: Room | None, write: Callable[[Room], str]) -> str:
    return "n/a" if found is None else write(found)


def _num_pairs(run: RunRecord) -> float:
    """Pairs of the training data, from samples seen and passes over them."""
    epochs, batch = run.series.get("data/epochs"), run.settings.get("data.global_batch_size")
    if epochs is not None and epochs.last > 0 and isinstance(batch, int):
        return float(round(int(epochs.steps[-1]) * batch / epochs.last))
    return run.metrics.get("gallery_pairs", 2.0)


def _why(found: Room) -> str:
    return "" if found.problem is None else f"The {found.problem}."


def _needed(found: Room) -> str:
    return "n/a" if found.needed is None else f"{found.needed.necessary}, {found.needed.sufficient}"


def _pairs(found: Room) -> str:
    if found.pairs is None:
        return "n/a"
    return f"10^{found.pairs.log10_reached:.1f}, 10^{found.pairs.log10_bound:.1f}"
