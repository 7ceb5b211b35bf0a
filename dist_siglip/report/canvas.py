"""Drawings as SVG text that takes its colours from the page.

Lines and letters are drawn in ``currentColor``, so one drawing serves light and dark pages. What
differs in colour differs in shape or line style too.
"""

import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Series:
    """One logged quantity over steps, sorted, one value per step, finite values only.

    Attributes:
        steps: (n,) int64, n at least 1.
        values: (n,) float64.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """Value of the last step."""
        return float(self.values[-1])

    @property
    def median(self) -> float:
        """Median over the logged steps."""
        return float(np.median(self.values))

    def tail(self, share: float) -> np.ndarray:
        """Values of the last ``share`` of the steps, at least one.

        Example:
            >>> Series(np.arange(4), np.arange(4.0)).tail(0.5).tolist()
            [2.0, 3.0]
        """
        return self.values[-max(1, round(share * len(self.values))) :]


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # becomes currentColor
IMAGE_COLOUR, TEXT_COLOUR = "#3987d1", "#d9782d"
# Of runs side by side; those after the last begin again, in another line style.
COLOURS = ("#3987d1", "#d9782d", "#2f9e6e", "#a566c9", "#c64b6b", "#8a8f3c")
STYLES = ("-", "--", "-.", ":")
_MOST_POINTS = 1500
_WIDTH_INCHES = 4.6  # narrow: letters must stay readable when a phone shrinks the drawing
_SMALL_INCHES = 2.1


class Curve(NamedTuple):
    """One line of a drawing.

    Attributes:
        label: in the legend; empty for none.
        series: what is drawn.
        colour: of the line.
        style: of the line, as matplotlib names it.
        marker: at each point, or "".
    """

    label: str
    series: Series
    colour: str
    style: str = "-"
    marker: str = ""


def colour_of(index: int) -> str:
    """Colour of run ``index``.

    Example:
        >>> colour_of(0) == colour_of(len(COLOURS))
        True
    """
    return COLOURS[index % len(COLOURS)]


def draw_curves(
    name: str,
    description: str,
    panels: Sequence[tuple[str, Sequence[Curve]]],
    *,
    may_be_logarithmic: Collection[str] = (),
) -> str | None:
    """Draw curves over steps, panels below each other; None without any curve.

    Args:
        name: keeps ids of several drawings on a page apart.
        description: what a screen reader says.
        panels: name of the upright axis, and curves; panels without curves are left out.
        may_be_logarithmic: names of upright axes that are logarithmic if values are positive and
            differ by more than a factor of 20.
    """
    filled = [(label, curves) for label, curves in panels if curves]
    if not filled:
        return None
    figure, all_axes = new_figure(len(filled), 2.9 if len(filled) == 1 else 1.35 * len(filled) + 1)
    for axes, (label, curves) in zip(all_axes, filled, strict=True):
        for curve in curves:
            axes.plot(
                *thin(curve.series),
                color=curve.colour,
                linestyle=curve.style,
                marker=curve.marker,
                markersize=4,
                linewidth=1.4,
                # With a space before it: matplotlib hides labels that begin with "_".
                label=f" {curve.label}" if curve.label else "_",
            )
        everything = np.concatenate([curve.series.values for curve in curves])
        is_wide = everything.min() > 0 and everything.max() > 20 * everything.min()
        if is_wide and label in may_be_logarithmic:
            axes.set_yscale("log")
        axes.set_ylabel(label)
        if any(curve.label for curve in curves):
            add_legend(axes)
    all_axes[-1].set_xlabel("optimizer step")
    return to_svg(figure, name, description)


def thin(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """At most 1500 points, the first and the last included."""
    chosen = np.linspace(0, len(series.steps) - 1, min(len(series.steps), _MOST_POINTS))
    chosen = chosen.round().astype(int)
    return series.steps[chosen], series.values[chosen]


def new_figure(num_panels: int, height_inches: float) -> tuple["Figure", list["Axes"]]:
    """Make panels below each other, with a common horizontal axis."""
    from matplotlib.figure import Figure

    size = (_WIDTH_INCHES, height_inches)
    figure = Figure(figsize=size, dpi=200, facecolor="none", layout="constrained")
    all_axes = figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0]
    for axes in all_axes:
        _dress(axes)
    return figure, list(all_axes)


def new_small_figure(height_inches: float) -> tuple["Figure", "Axes"]:
    """Make one of many small drawings, with room for numbers below it and for nothing else."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SMALL_INCHES, height_inches), dpi=200, facecolor="none")
    # No layout to search for: that would take as long as the drawing.
    axes = figure.add_axes((0.03, 0.25 / height_inches, 0.94, 1 - 0.28 / height_inches))
    _dress(axes)
    return figure, axes


def _dress(axes: "Axes") -> None:
    axes.set_facecolor("none")
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color=INK, alpha=0.13, linewidth=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def add_legend(axes: "Axes") -> None:
    """Name the curves, without a frame."""
    legend = axes.legend(frameon=False, labelcolor=INK, fontsize=9, markerscale=1.3)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in the name of a run is a dollar


def to_svg(figure: "Figure", name: str, description: str) -> str:
    """Write the figure as an SVG element that stands in an HTML page.

    Args:
        figure: the figure.
        name: keeps ids of several drawings on a page apart; letters, digits, hyphens.
        description: what a screen reader says; it must not hold anything of the user's.
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
    return svg.replace(INK, "currentColor")
