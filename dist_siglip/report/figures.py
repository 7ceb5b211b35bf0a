"""The drawings of the report, as SVG text that takes its colours from the page.

Lines and letters are drawn in ``currentColor``, so one drawing serves light and dark pages.
Modalities and kinds differ in shape or line style as well as in colour.
"""

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dist_siglip.report.records import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#010203"  # becomes currentColor
_FIRST, _SECOND, _THIRD = "#3987d1", "#d9782d", "#2f9e6e"
_MOST_POINTS = 1500
_MOST_PAIRS = 800
_MOST_LINKS = 40
_HISTOGRAM_BARS = 60


def draw_loss(series: Mapping[str, Series]) -> str | None:
    """Training and validation loss over steps; None if neither was logged."""
    train, validation = series.get("train/loss"), series.get("val/loss")
    if train is None and validation is None:
        return None
    figure, (axes,) = _new_figure(1, 2.9)
    if train is not None:
        steps, values = _thin(train)
        axes.plot(steps, values, color=_FIRST, linewidth=1.4, label="training batches")
    if validation is not None:
        axes.plot(
            *_thin(validation),
            "s--",
            color=_SECOND,
            markersize=4,
            linewidth=1.2,
            label="validation",
        )
    everything = np.concatenate([s.values for s in (train, validation) if s is not None])
    if everything.min() > 0 and everything.max() > 20 * everything.min():
        axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    _legend(axes)
    return _to_svg(figure, "loss", "Loss over optimizer steps, training and validation")


def draw_scale_and_bias(series: Mapping[str, Series]) -> str | None:
    """Logit scale, logit bias and relative bias over steps; None if none was logged."""
    scale, bias = series.get("train/logit_scale"), series.get("train/logit_bias")
    relative = series.get("train/relative_bias")
    if relative is None and scale is not None and bias is not None:
        relative = _relative_bias(scale, bias)
    panels = [
        (name, values)
        for name, values in (
            ("logit scale", scale),
            ("logit bias", bias),
            ("relative bias", relative),
        )
        if values is not None
    ]
    if not panels:
        return None
    figure, all_axes = _new_figure(len(panels), 1.25 * len(panels) + 0.6)
    for axes, (name, values), colour in zip(
        all_axes, panels, (_FIRST, _SECOND, _THIRD), strict=False
    ):
        axes.plot(*_thin(values), color=colour, linewidth=1.6, label="learned")
        axes.set_ylabel(name)
        best = series.get("val/relative_bias")
        if name == "relative bias" and best is not None:
            axes.plot(*_thin(best), "s--", color=_INK, markersize=4, linewidth=1, label="best")
            _legend(axes)
    all_axes[-1].set_xlabel("optimizer step")
    return _to_svg(figure, "scale", "Logit scale, logit bias and relative bias over steps")


def draw_modalities(image_features: np.ndarray, text_features: np.ndarray) -> str | None:
    """Both modalities on their two common principal axes; None if there is no plane."""
    from sklearn.decomposition import PCA

    num_pairs, width = image_features.shape
    if num_pairs < 2 or width < 2:
        return None
    chosen = np.linspace(0, num_pairs - 1, min(num_pairs, _MOST_PAIRS)).round().astype(int)
    images, texts = image_features[chosen], text_features[chosen]
    both = np.concatenate([images, texts]).astype(np.float64)
    if np.ptp(both, axis=0).max() == 0:
        return None
    model = PCA(n_components=2, svd_solver="full")
    image_points, text_points = np.split(model.fit_transform(both), 2)
    figure, (axes,) = _new_figure(1, 3.6)
    links = np.linspace(0, len(chosen) - 1, min(len(chosen), _MOST_LINKS)).round().astype(int)
    for image_point, text_point in zip(image_points[links], text_points[links], strict=True):
        axes.plot(*zip(image_point, text_point, strict=True), color=_INK, alpha=0.25, linewidth=0.7)
    for points, marker, colour, name in (
        (image_points, "o", _FIRST, "images"),
        (text_points, "^", _SECOND, "texts"),
    ):
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=14,
            marker=marker,
            color=colour,
            alpha=0.7,
            linewidths=0,
            label=name,
            rasterized=True,
        )
    shares = 100 * model.explained_variance_ratio_
    axes.set_xlabel(f"first axis ({shares[0]:.0f} % of variance)")
    axes.set_ylabel(f"second axis ({shares[1]:.0f} %)")
    axes.set_aspect("equal", adjustable="datalim")
    _legend(axes)
    return _to_svg(figure, "pca", "Images and texts on two principal axes, some pairs joined")


def draw_logits(
    arrays: Mapping[str, np.ndarray], logit_scale: float | None, logit_bias: float | None
) -> str | None:
    """Share of positive and negative pairs by logit, or by cosine if scale or bias is unknown."""
    edges, counts = _coarse_histograms(arrays)
    if edges is None:
        return None
    label = "cosine"
    if logit_scale is not None and logit_bias is not None:
        edges, label = logit_scale * edges + logit_bias, "logit"
    figure, (axes,) = _new_figure(1, 2.9)
    for kind, colour, style in (("negative", _SECOND, "--"), ("positive", _FIRST, "-")):
        share = counts[kind] / max(1, counts[kind].sum())
        # A log axis has no place for zero: bars without pairs end below the drawing.
        axes.stairs(share, edges, color=colour, linestyle=style, linewidth=1.5, label=kind)
        axes.stairs(share, edges, color=colour, alpha=0.18, fill=True)
    smallest = min(1 / max(1, counts[kind].sum()) for kind in counts)
    axes.set_yscale("log")
    axes.set_ylim(smallest / 2, 1.5)
    if label == "logit":
        axes.axvline(0, color=_INK, linewidth=1, linestyle=":")
    axes.set_xlabel(label)
    axes.set_ylabel("share of pairs of its kind")
    _legend(axes)
    return _to_svg(figure, "logits", f"Positive and negative pairs by {label}, logarithmic")


def _coarse_histograms(
    arrays: Mapping[str, np.ndarray],
) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
    """Cut the fine histograms to where pairs are, and merge bins to about 60 bars."""
    edges = arrays.get("histogram_edges")
    fine = {kind: arrays.get(f"{kind}_histogram") for kind in ("positive", "negative")}
    present = {kind: bins for kind, bins in fine.items() if bins is not None}
    if edges is None or len(present) < 2:
        return None, {}
    if any(bins.shape != (len(edges) - 1,) for bins in present.values()):
        return None, {}
    occupied = np.flatnonzero(present["positive"] + present["negative"])
    if not len(occupied):
        return None, {}
    first, last = int(occupied[0]), int(occupied[-1]) + 1
    step = max(1, -(-(last - first) // _HISTOGRAM_BARS))
    starts = np.arange(first, last, step)
    ends = np.append(starts[1:], min(int(starts[-1]) + step, len(edges) - 1))
    coarse = {
        kind: np.array([bins[a:b].sum() for a, b in zip(starts, ends, strict=True)])
        for kind, bins in present.items()
    }
    return np.append(edges[starts], edges[ends[-1]]), coarse


def _relative_bias(scale: Series, bias: Series) -> Series | None:
    steps, at_scale, at_bias = np.intersect1d(scale.steps, bias.steps, return_indices=True)
    scales = scale.values[at_scale]
    if not len(steps) or (scales <= 0).any():
        return None
    return Series(steps, -bias.values[at_bias] / scales)


def _thin(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """At most ``_MOST_POINTS`` points, the last one included."""
    chosen = np.linspace(0, len(series.steps) - 1, min(len(series.steps), _MOST_POINTS))
    chosen = chosen.round().astype(int)
    return series.steps[chosen], series.values[chosen]


def _new_figure(num_panels: int, height_inches: float) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    # Narrow on purpose: letters must stay readable when a phone shrinks the drawing.
    figure = Figure(figsize=(4.6, height_inches), dpi=200, facecolor="none", layout="constrained")
    all_axes = figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0]
    for axes in all_axes:
        axes.set_facecolor("none")
        axes.tick_params(which="both", colors=_INK, labelsize=9)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        axes.grid(color=_INK, alpha=0.13, linewidth=0.7)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
    return figure, list(all_axes)


def _legend(axes: "Axes") -> None:
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9, markerscale=1.3)


def _to_svg(figure: "Figure", name: str, description: str) -> str:
    """Write the figure as an SVG element that stands in an HTML page.

    Args:
        figure: the figure.
        name: keeps ids of several drawings on a page apart.
        description: what a screen reader says.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # In HTML the namespaces are known, and the page sets the size.
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")]) + (
        svg[svg.index(">") :].replace("xlink:href", "href")
    )
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
    # Ids of axes are the same in every drawing.
    svg = re.sub(r'(<g id=")([^"]+")', rf"\g<1>{name}-\g<2>", svg)
    return svg.replace(_INK, "currentColor")
