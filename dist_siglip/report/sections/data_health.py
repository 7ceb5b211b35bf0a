"""Replaced samples, skipped steps and duplicates."""

from collections.abc import Sequence

from dist_siglip.report.history import Reasons
from dist_siglip.report.measures import show
from dist_siglip.report.page import (
    Section,
    Verdict,
    columns_of,
    judge_each,
    render_columns,
    render_details,
    render_table_card,
)
from dist_siglip.report.records import RunRecord

_MANY_BAD = 0.001  # of the samples seen
_MANY_SKIPPED = 0.01  # of the steps
_MOST_REASONS = 8


def make(runs: Sequence[RunRecord]) -> Section:
    """Count samples that were replaced and steps that were skipped, by reason."""
    rows = [
        ["passes over the data", *(show(_last(run, "data/epochs"), "{:.2f}") for run in runs)],
        [
            "replaced samples\nbad ones, in whose place another stood",
            *(show(_last(run, "train/substituted_samples"), "{:,.0f}") for run in runs),
        ],
        ["skipped steps", *(show(_last(run, "train/skipped_steps"), "{:,.0f}") for run in runs)],
        [
            "equal captions or pictures in a batch\npairs of them, newest logged batch",
            *(show(_last(run, "train/duplicate_captions"), "{:,.0f}") for run in runs),
        ],
        [
            "validation pairs\nthat the newest evaluation saw",
            *(show(run.metrics.get("gallery_pairs"), "{:,.0f}") for run in runs),
        ],
        [
            "validation pairs there are",
            *(show(run.metrics.get("available_pairs"), "{:,.0f}") for run in runs),
        ],
        [
            "different captions among them",
            *(show(run.metrics.get("distinct_captions"), "{:,.0f}") for run in runs),
        ],
        [
            "different pictures among them",
            *(show(run.metrics.get("distinct_pictures"), "{:,.0f}") for run in runs),
        ],
    ]
    rows = [row for row in rows if any(cell != "n/a" for cell in row[1:])]
    cards = [render_table_card("In numbers", columns_of(runs), rows)] if rows else []
    listed = []
    for run in runs:
        whose = f" ({run.name})" if len(runs) > 1 else ""
        for title, reasons in (
            ("Why samples were replaced", run.incidents.bad_samples),
            ("Why steps were skipped", run.incidents.skipped_steps),
        ):
            if reasons.total:
                cards.append(render_table_card(title + whose, ("reason", "times"), _rows(reasons)))
                first = "The first of them" + whose
                listed.append(render_details(first, "\n".join(reasons.examples)))
    verdicts = judge_each(runs, judge_samples, judge_steps, judge_captions)
    return Section("data", "Data health", verdicts, [render_columns(cards), *listed])


def judge_samples(run: RunRecord) -> Verdict:
    """Say how many samples were bad."""
    replaced = _last(run, "train/substituted_samples")
    if replaced is None:
        return Verdict("unknown", "The run has not logged how many samples were bad.")
    if not replaced:
        return Verdict("good", "Every sample was sound.", "None had to be replaced by another.")
    batch = run.settings.get("data.global_batch_size")
    seen = run.last_step * batch if isinstance(batch, int) and batch > 0 else None
    share = "" if not seen else f", {100 * replaced / seen:.2f} % of those seen"
    common = run.incidents.bad_samples.counts.most_common(1)
    reason = f"Most often: {common[0][0]}." if common else "They are named in bad_samples.jsonl."
    tone = "watch" if not seen or replaced > _MANY_BAD * seen else "note"
    return Verdict(
        "watch" if tone == "watch" else "note",
        f"{replaced:,.0f} bad sample(s) were replaced by others{share}.",
        reason,
    )


def judge_steps(run: RunRecord) -> Verdict | None:
    """Say how many steps were skipped; nothing if none was."""
    skipped = _last(run, "train/skipped_steps") or run.incidents.skipped_steps.total
    if not skipped:
        return None
    common = run.incidents.skipped_steps.counts.most_common(1)
    share = skipped / max(1, run.last_step)
    return Verdict(
        "watch" if share > _MANY_SKIPPED else "note",
        f"{skipped:,.0f} of {run.last_step:,} steps were skipped.",
        f"Most often: {common[0][0]}." if common else "See skipped_steps.jsonl.",
    )


def judge_captions(run: RunRecord) -> Verdict | None:
    """Say so if many validation captions are equal, which makes retrieval look easier."""
    pairs, distinct = (run.metrics.get(k) for k in ("gallery_pairs", "distinct_captions"))
    if not pairs or not distinct or distinct > 0.5 * pairs:
        return None
    return Verdict(
        "watch",
        f"Only {distinct:,.0f} of {pairs:,.0f} validation captions are different.",
        "An equal caption counts as a hit, so recall is easier here than with captions of their "
        "own; and in training equal captions are negatives of each other unless the loss is told "
        "otherwise (duplicates).",
    )


def _last(run: RunRecord, key: str) -> float | None:
    series = run.series.get(key)
    return None if series is None else series.last


def _rows(reasons: Reasons) -> list[list[str]]:
    return [[reason, f"{count:,}"] for reason, count in reasons.counts.most_common(_MOST_REASONS)]
