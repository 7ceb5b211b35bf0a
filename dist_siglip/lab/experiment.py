"""What is an experiment, and when does it count as reproduced?

An experiment is a module of ``lab.experiments`` with a function

    run(settings: LabSettings) -> Outcome

that trains or computes with the library's own losses and metrics and puts each number beside the
published one. Its module docstring says what is asked and where the numbers were published.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPRODUCED, DIFFERS, UNPUBLISHED = "reproduced", "differs", "no published value"


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
        """Whether nothing is left to explain."""
        return self.verdict != DIFFERS


class Outcome(NamedTuple):
    """What an experiment gives.

    Attributes:
        rows: the table.
        figure: the drawing.
        notes: what a reader must know to judge the table: steps, seeds, corrections.
    """

    rows: tuple[Row, ...]
    figure: "Figure"
    notes: tuple[str, ...] = ()


def _ignore(share_done: float) -> None:
    """Show no progress."""


@dataclass(frozen=True, kw_only=True)
class LabSettings:
    """What every experiment is told.

    Args:
        quick: run fewer cases, each as long as in the full experiment, so that what is left
            in the table keeps its tolerance.
        seed: added to the seed that the authors used; 0 repeats theirs.
        progress: called with the share of the work that is done, from 0 to 1.
    """

    quick: bool = False
    seed: int = 0
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
