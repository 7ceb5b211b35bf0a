"""What is a section of the report: a heading, conclusions about each run, and parts below them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dist_siglip.report.page import render_section
from dist_siglip.report.records import RunRecord
from dist_siglip.report.verdict import Verdict, render_headline, render_verdict


@dataclass(frozen=True)
class Section:
    """One question that the report answers.

    Attributes:
        key: where links point to; letters and hyphens.
        heading: plain text.
        verdicts: run and conclusion, in the order of the runs.
        parts: HTML.
    """

    key: str
    heading: str
    verdicts: list[tuple[RunRecord, Verdict]]
    parts: list[str] = field(default_factory=list)

    def render(self) -> str:
        """Write the section as HTML."""
        name_runs = len({run.name for run, _ in self.verdicts}) > 1
        verdicts = [render_verdict(v, run.name if name_runs else "") for run, v in self.verdicts]
        return render_section(self.heading, *verdicts, *self.parts, key=self.key)

    def headlines(self, run: RunRecord) -> list[str]:
        """Write the conclusions about a run as HTML, without their reasons."""
        return [render_headline(verdict) for each, verdict in self.verdicts if each is run]


def judge_each(
    runs: Sequence[RunRecord], *judges: Callable[[RunRecord], Verdict | None]
) -> list[tuple[RunRecord, Verdict]]:
    """Ask every judge about every run; a judge without an opinion gives None."""
    found = ((run, judge(run)) for judge in judges for run in runs)
    return [(run, verdict) for run, verdict in found if verdict is not None]


def columns_of(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """Headings of a table with a column for each run; none for a single run."""
    return ("", *(run.name for run in runs)) if len(runs) > 1 else ()


def name_of(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Name of a run for the end of a heading, as ``": name"``; "" for a single run."""
    return f": {run.name}" if len(runs) > 1 else ""
