"""How do the drawings of the experiments look?

White ground, so that they read on light and dark pages; kinds differ in shape or line style as
well as in colour.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_siglip.lab.free_embeddings import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2f6fb0", "#d9782d", "#2f9e6e", "#a04fb0", "#8a6d3b", "#555555")
# One fewer than colours, so that 30 curves differ.
LINES = ("-", "--", "-.", ":", (0, (5, 1)))
MARKERS = ("o", "s", "^", "D", "v", "x")


def new_figure(
    num_panels: int = 1, *, panel_width: float = 4.2, height: float = 3.2
) -> tuple["Figure", list["Axes"]]:
    """Return a figure with panels side by side, and their axes.

    Args:
        num_panels: how many.
        panel_width: of one panel, in inches.
        height: of the figure, in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panel_width * num_panels, height), dpi=120, layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.tick_params(which="both", labelsize=8)
        axes.grid(alpha=0.2, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def draw_loss(axes: "Axes", number: int, training: Training, name: str) -> None:
    """Draw the loss curve of a training, each number in a colour and line style of its own."""
    axes.loglog(
        training.recorded_steps,
        training.recorded_losses,
        linestyle=LINES[number % len(LINES)],
        color=COLOURS[number % len(COLOURS)],
        label=name,
    )


def label(axes: "Axes", title: str, x: str, y: str) -> None:
    """Write title and axis labels of a panel, and its legend if anything is named."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def compare(
    axes: "Axes", x: Sequence[float], published: Sequence[float | None], ours: Sequence[float]
) -> None:
    """Draw published values as open squares and ours as dots, over the same x."""
    shown = [(a, b) for a, b in zip(x, published, strict=True) if b is not None]
    if shown:
        axes.plot(
            *zip(*shown, strict=True),
            "s",
            markersize=9,
            markerfacecolor="none",
            color=COLOURS[1],
            label="published",
        )
    axes.plot(x, ours, "o", markersize=4, color=COLOURS[0], label="ours")
