"""Throughput, and the share of the time spent waiting for data."""

from collections.abc import Sequence

import numpy as np

from dist_siglip.report.canvas import Curve, colour_of, draw_curves
from dist_siglip.report.measures import show
from dist_siglip.report.page import (
    Section,
    Verdict,
    columns_of,
    judge_each,
    render_columns,
    render_figure,
    render_table_card,
)
from dist_siglip.report.records import RunRecord

_SPEED, _WAIT = "train/pairs_per_second", "train/data_wait_percent"
_BOUND, _SOME = 33.0, 10.0  # percent of the time spent waiting for data
_SLOWER = 0.8  # of the first half, below which a run has become slow


def make(runs: Sequence[RunRecord]) -> Section:
    """Draw pairs per second and the share of the time spent waiting for data."""
    names = [run.short_name if len(runs) > 1 else "" for run in runs]
    panels = [
        (
            label,
            [
                Curve(name if key == _SPEED else "", run.series[key], colour_of(i))
                for i, (run, name) in enumerate(zip(runs, names, strict=True))
                if key in run.series
            ],
        )
        for label, key in (("pairs per second", _SPEED), ("waiting for data, %", _WAIT))
    ]
    figure = render_figure(
        "Throughput",
        draw_curves("speed", "Pairs per second and share of time waiting for data", panels),
        "Pairs of the global batch per second of training; evaluation and saving are not counted.",
        missing="No speed was logged.",
    )
    rows = [
        [
            "pairs per second\nof training, median over logged steps",
            *(show(_median(run, _SPEED), "{:,.0f}") for run in runs),
        ],
        [
            "waiting for data\nshare of the time, median",
            *(show(_median(run, _WAIT), "{:.0f} %") for run in runs),
        ],
        [
            "processes\nof the newest start",
            *(show(_world_size(run), "{:.0f}") for run in runs),
        ],
        ["optimizer steps", *(f"{run.last_step:,}" for run in runs)],
    ]
    parts = [render_columns([figure, render_table_card("In numbers", columns_of(runs), rows)])]
    return Section("speed", "Throughput", judge_each(runs, judge, judge_change), parts)


def judge(run: RunRecord) -> Verdict:
    """Say whether the model or its data was waited for."""
    speed, wait = _median(run, _SPEED), _median(run, _WAIT)
    if speed is None or wait is None:
        return Verdict("unknown", "The run has logged no speed.")
    told = f"{speed:,.0f} pairs/s"
    if wait >= _BOUND:
        return Verdict(
            "watch",
            f"The run waits for its data for {wait:.0f} % of the time ({told}).",
            "More loader processes (data.workers_per_rank), smaller pictures in the shards, or a "
            "faster disk would speed it up; a faster device would not.",
        )
    if wait >= _SOME:
        return Verdict(
            "note",
            f"The run waits for its data for {wait:.0f} % of the time ({told}).",
            "One or two more loader processes may be worth trying.",
        )
    return Verdict(
        "good",
        f"The run is bound by its model: {told}.",
        f"It waits for data for {wait:.0f} % of the time.",
    )


def judge_change(run: RunRecord) -> Verdict | None:
    """Say so if the run has become slower."""
    speed = run.series.get(_SPEED)
    if speed is None or len(speed.values) < 8:
        return None
    first, second = (float(np.median(half)) for half in np.array_split(speed.values, 2))
    if second >= _SLOWER * first:
        return None
    return Verdict(
        "watch",
        f"The second half of the run was slower: {second:,.0f} pairs/s after {first:,.0f}.",
        "Look for another job on the machine, a hot device, a cache that no longer fits.",
    )


def _median(run: RunRecord, key: str) -> float | None:
    series = run.series.get(key)
    return None if series is None else series.median


def _world_size(run: RunRecord) -> float | None:
    value = run.provenance.get("world_size")
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else None
