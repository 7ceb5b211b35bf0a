"""Drawings of the embedding space, step by step.

Each picture shows the same few pairs. Three axes hold only a part of a space of many dimensions;
the captions say how much.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dist_siglip.report.canvas import (
    IMAGE_COLOUR,
    INK,
    TEXT_COLOUR,
    add_legend,
    new_figure,
    new_small_figure,
    to_svg,
)
from dist_siglip.report.history import KeptEvaluation
from dist_siglip.report.page import (
    Section,
    Tone,
    Verdict,
    judge_each,
    name_of,
    render_columns,
    render_figure,
    render_missing,
    render_multiples,
)
from dist_siglip.report.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_PAIRS = 800
_MOST_SMALL = 250
_MOST_LINKS = 40
_TILT = np.radians(20)  # of the sphere towards the reader
_NO_GAP, _CLOSED = 1e-6, 0.1
_KINDS = (("o", IMAGE_COLOUR, "images"), ("^", TEXT_COLOUR, "texts"))


def make(runs: Sequence[RunRecord]) -> Section:
    """Draw both modalities on two axes, and on a sphere at several steps."""
    figures, parts = [], []
    for index, run in enumerate(runs):
        whose = name_of(run, runs)
        drawing = None
        if run.features is not None:
            drawing = draw_modalities(*run.features, name=f"pca-{index}")
        figures.append(
            render_figure(
                f"Both modalities{whose}",
                drawing,
                "Principal axes of images and texts together; lines join some pairs. Two separate "
                "clouds are usual after contrastive training.",
                missing="No evaluation with arrays is in this run folder; validate the run first.",
            )
        )
        if run.history:
            spheres, share = draw_spheres(run.history, name=f"sphere-{index}")
            parts.append(
                render_multiples(
                    f"On a sphere, step by step{whose}",
                    spheres,
                    "Images blue, texts orange; faint points lie behind. From left to right runs "
                    "the line between the two centroids; the other two axes hold most of the rest. "
                    f"Together they hold {100 * share:.0f} % of the squared length, and points are "
                    "drawn in their direction. A cone is a small patch, a gap keeps the colours "
                    "apart, a space that is used covers the sphere.",
                )
            )
        else:
            kept = f"No evaluation of an earlier step is kept{whose}."
            parts.append(render_missing(kept))
    verdicts = judge_each(runs, judge)
    return Section("shapes", "The space, step by step", verdicts, [render_columns(figures), *parts])


def judge(run: RunRecord) -> Verdict:
    """Compare the first and the last kept evaluation."""
    if len(run.history) < 2:
        return Verdict("unknown", "Too few evaluations are kept to see how the space changed.")
    first, last = run.history[0], run.history[-1]
    gaps = [_gap(kept) for kept in (first, last)]
    cones = [max(_cone(kept.image_features), _cone(kept.text_features)) for kept in (first, last)]
    moved = "widened" if gaps[1] > gaps[0] else "closed" if gaps[1] < _CLOSED else "narrowed"
    spread = "opened" if cones[1] < cones[0] else "narrowed"
    tone: Tone = "watch"
    if spread == "opened":
        tone = "note" if moved == "widened" else "good"
    return Verdict(
        tone,
        f"Between steps {first.step:,} and {last.step:,} the cones {spread} and the gap {moved}.",
        f"Mean cosine within the narrower modality {cones[0]:.2f}, then {cones[1]:.2f}; distance "
        f"of the centroids {gaps[0]:.2f}, then {gaps[1]:.2f}. Untrained towers map everything into "
        "two narrow cones; training opens them first, and closes the gap only as far as the loss "
        "asks for it.",
    )


def draw_modalities(
    image_features: np.ndarray, text_features: np.ndarray, *, name: str = "pca"
) -> str | None:
    """Both modalities on their two common principal axes; None if there is no plane."""
    from sklearn.decomposition import PCA

    num_pairs, width = image_features.shape
    if num_pairs < 2 or width < 2:
        return None
    chosen = _evenly(num_pairs, _MOST_PAIRS)
    images, texts = image_features[chosen], text_features[chosen]
    both = np.concatenate([images, texts]).astype(np.float64)
    if np.ptp(both, axis=0).max() == 0:
        return None
    model = PCA(n_components=2, svd_solver="full")
    image_points, text_points = np.split(model.fit_transform(both), 2)
    figure, (axes,) = new_figure(1, 3.6)
    links = _evenly(len(chosen), _MOST_LINKS)
    for image_point, text_point in zip(image_points[links], text_points[links], strict=True):
        axes.plot(*zip(image_point, text_point, strict=True), color=INK, alpha=0.25, linewidth=0.7)
    for points, (marker, colour, label) in zip((image_points, text_points), _KINDS, strict=True):
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=14,
            marker=marker,
            color=colour,
            alpha=0.7,
            linewidths=0,
            label=label,
            rasterized=True,
        )
    shares = 100 * model.explained_variance_ratio_
    axes.set_xlabel(f"first axis ({shares[0]:.0f} % of variance)")
    axes.set_ylabel(f"second axis ({shares[1]:.0f} %)")
    axes.set_aspect("equal", adjustable="datalim")
    add_legend(axes)
    return to_svg(figure, name, "Images and texts on two principal axes, some pairs joined")


def draw_spheres(
    history: Sequence[KeptEvaluation], *, name: str
) -> tuple[list[tuple[str, str]], float]:
    """Draw each kept evaluation on a sphere, seen from one place.

    Returns:
        Titles and drawings, and the share of squared length that the three axes hold.
    """
    drawings, held = [], []
    for kept in history:
        axes = axes_of(kept)
        chosen = _evenly(len(kept.image_features), _MOST_SMALL)
        sides = [f[chosen] @ axes for f in (kept.image_features, kept.text_features)]
        held.append(float(np.mean([(points**2).sum(axis=1).mean() for points in sides])))
        drawings.append((f"step {kept.step:,}", _draw_sphere(sides, f"{name}-{kept.step}")))
    return drawings, float(np.mean(held))


def axes_of(kept: KeptEvaluation) -> np.ndarray:
    """Three orthonormal directions to look at an evaluation along, (D, 3).

    To the right: from the centroid of the texts to that of the images. Then the two directions of
    largest mean square across it, without taking the mean away, so that a cone stays one; the
    first points to where most of the points are. Missing dimensions are filled up with zeros.
    """
    images, texts = kept.image_features, kept.text_features
    width = images.shape[1]
    right = images.mean(axis=0) - texts.mean(axis=0)
    length = float(np.linalg.norm(right))
    right = right / length if length > _NO_GAP else np.eye(width)[0]
    both = np.concatenate([images, texts])
    across = both - np.outer(both @ right, right)
    others = np.linalg.eigh(across.T @ across)[1][:, ::-1][:, : min(2, width - 1)]
    signs = np.where((both @ others).mean(axis=0) < 0, -1.0, 1.0)
    axes = np.concatenate([right[:, None], others * signs], axis=1)
    return np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])))


def _draw_sphere(sides: Sequence[np.ndarray], name: str) -> str:
    figure, axes = new_small_figure(2.1)
    axes.set_position((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(-1.06, 1.06)
    axes.set_ylim(-1.06, 1.06)
    _draw_globe(axes)
    for is_front in (False, True):
        for points, (marker, colour, _) in zip(sides, _KINDS, strict=True):
            lengths = np.linalg.norm(points, axis=1, keepdims=True)
            seen = _turn(points / np.maximum(lengths, 1e-9))
            shown = seen[(seen[:, 2] >= 0) == is_front]
            axes.scatter(
                shown[:, 0],
                shown[:, 1],
                s=9,
                marker=marker,
                color=colour,
                alpha=0.75 if is_front else 0.18,
                linewidths=0,
                rasterized=True,
            )
    return to_svg(figure, name, "Images and texts on a sphere")


def _draw_globe(axes: "Axes") -> None:
    """Outline, and the half of three great circles that faces the reader."""
    angle = np.linspace(0, 2 * np.pi, 181)
    axes.plot(np.cos(angle), np.sin(angle), color=INK, alpha=0.5, linewidth=0.8)
    circle = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=1)
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        seen = _turn(circle[:, order])
        seen[seen[:, 2] < 0] = np.nan
        axes.plot(seen[:, 0], seen[:, 1], color=INK, alpha=0.2, linewidth=0.6)


def _turn(points: np.ndarray) -> np.ndarray:
    """Coordinates to the right, up, and towards the reader of (right, forward, up)."""
    right, forward, up = points.T
    height = up * np.cos(_TILT) - forward * np.sin(_TILT)
    return np.stack([right, height, forward * np.cos(_TILT) + up * np.sin(_TILT)], axis=1)


def _evenly(count: int, most: int) -> np.ndarray:
    """At most ``most`` row numbers of ``count``, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def _gap(kept: KeptEvaluation) -> float:
    difference = kept.image_features.mean(axis=0) - kept.text_features.mean(axis=0)
    return float(np.linalg.norm(difference))


def _cone(features: np.ndarray) -> float:
    """Mean cosine of two different rows of length 1."""
    count = len(features)
    total = float((features.sum(axis=0) ** 2).sum())
    return (total - count) / (count * (count - 1)) if count > 1 else 1.0
