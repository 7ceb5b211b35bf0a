"""Experiments: settings, the table of published and measured numbers, and its drawing.

An experiment is a module of ``lab.experiments`` with a function

    run(settings: LabSettings) -> Outcome

that trains or computes with the library's own losses and metrics and puts each number beside the
published one. Its module docstring names the question and where the numbers were published.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dist_siglip.lab.free_embeddings import Training

REPRODUCED, DIFFERS, UNPUBLISHED = "reproduced", "differs", "no published value"

# Drawings have a white ground, to be read on light and dark pages; their kinds differ in shape or
# line style as well as in colour.
COLOURS = ("#2f6fb0", "#d9782d", "#2f9e6e", "#a04fb0", "#8a6d3b", "#555555")
# One fewer than colours, so that 30 curves differ.
LINES = ("-", "--", "-.", ":", (0, (5, 1)))
MARKERS = ("o", "s", "^", "D", "v", "x")


class Row(NamedTuple):
    """One quantity of an experiment; ``judge`` and ``judge_claim`` make it.

    Attributes:
        quantity: what was measured, with its setting.
        published: the published number, or a claim in words; None if there is none.
        ours: what came out here.
        tolerance: largest distance from a published number that counts as reproduced.
        verdict: "reproduced", "differs" or "no published value"; with an explanation
            "corrected: ..." or "differs: ...", one sentence.
    """

    quantity: str
    published: float | str | None
    ours: float
    tolerance: float | None
    verdict: str

    @property
    def is_sound(self) -> bool:
        """Whether the number is reproduced, or the difference is explained."""
        return self.verdict != DIFFERS


class Outcome(NamedTuple):
    """Result of an experiment.

    Attributes:
        rows: the table.
        figure: the drawing.
        notes: what the reader of the table must know: steps, seeds, corrections.
    """

    rows: tuple[Row, ...]
    figure: "Figure"
    notes: tuple[str, ...] = ()


def _ignore(share_done: float) -> None:
    """Show no progress."""


@dataclass(frozen=True, kw_only=True)
class LabSettings:
    """Settings of every experiment.

    Args:
        quick: run fewer cases, each as long as in the full experiment, so that what is left
            in the table keeps its tolerance.
        seed: added to the seed that the authors used; 0 repeats theirs.
        processes: that the experiment may compute in; with 1 it computes in this one.
        progress: called with the share of the work that is done, from 0 to 1.
    """

    quick: bool = False
    seed: int = 0
    processes: int = 1
    progress: Callable[[float], None] = _ignore

    def part(self, number: int, of: int) -> "LabSettings":
        """Settings for one of several equal parts, whose progress fills its share of the whole.

        Example:
            >>> LabSettings(progress=print).part(1, of=4).progress(0.5)
            0.375
        """
        return replace(self, progress=lambda done: self.progress((number + done) / of))


def judge(
    quantity: str,
    published: float | None,
    ours: float,
    tolerance: float | None = None,
    *,
    correction: str | None = None,
    reason: str | None = None,
) -> Row:
    """Compare a number with the published one.

    Args:
        quantity: what was measured.
        published: None if nobody has published it.
        ours: NaN is never reproduced.
        tolerance: largest distance that counts as reproduced; 0 if there is none.
        correction: why a number that is off is right, in one sentence. A number within its
            tolerance is reproduced all the same.
        reason: why a number may be off, if nobody knows which one is right.

    Example:
        >>> judge("margin", 0.24, 0.2391, 0.01).verdict
        'reproduced'
        >>> judge("margin", 0.471, 0.2391, 0.01, correction="the table prints the full gap").verdict
        'corrected: the table prints the full gap'
    """
    if published is None:
        return Row(quantity, None, ours, None, UNPUBLISHED)
    holds = abs(ours - published) <= (tolerance or 0.0)
    verdict = _verdict(holds, correction)
    if verdict == DIFFERS and reason is not None:
        verdict = f"{DIFFERS}: {reason}"
    return Row(quantity, published, ours, tolerance, verdict)


def judge_claim(
    quantity: str, claim: str, ours: float, holds: bool, *, correction: str | None = None
) -> Row:
    """Compare a number with a published claim that is no number, such as "at most 1e-6".

    Example:
        >>> judge_claim("loss", "at most 1e-6", 2e-7, 2e-7 <= 1e-6).verdict
        'reproduced'
    """
    return Row(quantity, claim, ours, None, _verdict(holds, correction))


def _verdict(holds: bool, correction: str | None) -> str:
    if holds:
        return REPRODUCED
    return DIFFERS if correction is None else f"corrected: {correction}"


def new_figure(
    num_panels: int = 1, *, panel_width: float = 4.2, height: float = 3.2
) -> tuple["Figure", list["Axes"]]:
    """Return a figure with panels side by side, and their axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panel_width * num_panels, height), dpi=120, layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.tick_params(which="both", labelsize=8)
        axes.grid(alpha=0.2, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def draw_loss(axes: "Axes", number: int, training: "Training", name: str) -> None:
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


if TYPE_CHECKING:
    from matplotlib.figure import Figure
