"""Runs as the report sees them, without a folder."""

import numpy as np

from dist_siglip.report.canvas import Series
from dist_siglip.report.history import Incidents, KeptEvaluation, Reasons
from dist_siglip.report.records import RunRecord


def series(*values, every=10):
    """Values at steps 0, ``every``, ..."""
    return Series(np.arange(len(values)) * every, np.array(values, dtype=float))


def record(name="run", **parts):
    """A run of which only ``parts`` are known; ``series`` maps names to lists of values."""
    logged = {key: series(*values) for key, values in parts.pop("series", {}).items()}
    empty = {
        "metrics": {},
        "arrays": {},
        "captions": [],
        "pictures": [],
        "settings": {},
        "provenance": {},
        "history": [],
        "incidents": Incidents(Reasons(), Reasons()),
        "benchmarks": [],
        "texts": {},
    }
    return RunRecord(name=name, series=logged or {"train/loss": series(1.0)}, **(empty | parts))


def kept(step, images, texts):
    """A kept evaluation of these features, made of length 1, without any pair in its histograms."""
    rows = [np.asarray(each, dtype=np.float64) for each in (images, texts)]
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in rows]
    return KeptEvaluation(step, *unit, np.linspace(-1, 1, 5), np.zeros(4), np.zeros(4))


def histograms(positive, negative, num_bins=200):
    """Arrays of an evaluation with these cosines."""
    edges = np.linspace(-1, 1, num_bins + 1)
    return {
        "histogram_edges": edges,
        "positive_histogram": np.histogram(positive, edges)[0],
        "negative_histogram": np.histogram(negative, edges)[0],
    }
