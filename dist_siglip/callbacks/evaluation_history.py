"""Which of many evaluations are kept, and what of them, to see later how the space changed?

The same few pairs of every evaluation, so that a point can be followed from one to the next, and
coarse histograms of all pairs: some megabytes a run, however long it is.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from dist_siglip.runs import RunFolder
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.best_effort import going_on_without

MOST_KEPT = 8
_MOST_PAIRS = 500
_MOST_BINS = 400


def keep_evaluation(folder: RunFolder, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write down a part of an evaluation, and take away those that are too many.

    Args:
        folder: of the run.
        step: optimizer steps behind the evaluated weights; an earlier one of it is replaced.
        arrays: as ``Evaluation.arrays``. Kept are ``image_features`` and ``text_features`` of the
            first 500 pairs as float16, their ``sample_ids``, and both histograms in 400 bins.
    """
    packed = io.BytesIO()
    np.savez_compressed(packed, **_excerpt(arrays))
    with going_on_without(f"what is kept of the evaluation of step {step}"):
        write_atomically(folder.kept_evaluation(step), packed.getvalue())
    _drop(folder, surplus(list(folder.kept_evaluations()), MOST_KEPT))


def forget_after(folder: RunFolder, step: int) -> None:
    """Drop what is kept of later steps, which a run that goes on from ``step`` does again."""
    _drop(folder, [kept for kept in folder.kept_evaluations() if kept > step])


def surplus(steps: Sequence[int], most: int) -> list[int]:
    """Choose the steps to give up, so that at most ``most`` stay and lie evenly.

    The first and the last stay. Of the others the one whose neighbours lie closest together goes
    first; of several the earliest.

    Args:
        steps: in order.
        most: at least 2.

    Example:
        >>> surplus([0, 10, 20, 30, 31, 40], 4)
        [31, 10]
    """
    kept, given_up = list(steps), []
    while len(kept) > most:
        spans = [after - before for before, after in zip(kept, kept[2:], strict=False)]
        given_up.append(kept.pop(1 + spans.index(min(spans))))
    return given_up


def _excerpt(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    kept: dict[str, Any] = {
        name: arrays[name][:_MOST_PAIRS].astype(np.float16)
        for name in ("image_features", "text_features")
    }
    kept["sample_ids"] = arrays["sample_ids"][:_MOST_PAIRS]
    edges = arrays["histogram_edges"]
    merged = max(1, (len(edges) - 1) // _MOST_BINS)
    starts = np.arange(0, len(edges) - 1, merged)
    kept["histogram_edges"] = np.append(edges[starts], edges[-1])
    for name in ("positive_histogram", "negative_histogram"):
        kept[name] = np.add.reduceat(arrays[name], starts)
    return kept


def _drop(folder: RunFolder, steps: Sequence[int]) -> None:
    for step in steps:
        with suppress(OSError):
            folder.kept_evaluation(step).unlink()
