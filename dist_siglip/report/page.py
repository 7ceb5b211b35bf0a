"""The HTML of the report: one file, no script, nothing fetched, every text escaped.

A section has a heading, verdicts about each run in plain words with their reasons, and parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Literal

from dist_siglip.report.records import RunRecord

Tone = Literal["good", "note", "watch", "bad", "unknown"]

# Told by sign and word as well as by colour.
_WORDS: dict[Tone, str] = {
    "good": "\N{CHECK MARK} Good",
    "note": "\N{BULLET} Note",
    "watch": "\N{WHITE DIAMOND} Look at this",
    "bad": "\N{MULTIPLICATION X} Problem",
    "unknown": "? Not known",
}


@dataclass(frozen=True)
class Verdict:
    """One conclusion.

    Attributes:
        tone: how good that is.
        text: the conclusion, a sentence.
        reason: what it rests on, or what to do about it, in a sentence or two.
    """

    tone: Tone
    text: str
    reason: str = ""


def render_verdict(verdict: Verdict, run: str = "") -> str:
    """Write a verdict as a paragraph.

    Example:
        >>> render_verdict(Verdict("good", "1 < 2."))
        '<p class="verdict good"><b>✓ Good</b> 1 &lt; 2.</p>'
    """
    whose = f'<i class="run">{escape(run)}</i> ' if run else ""
    reason = f' <span class="soft">{escape(verdict.reason)}</span>' if verdict.reason else ""
    return (
        f'<p class="verdict {verdict.tone}"><b>{_WORDS[verdict.tone]}</b> {whose}'
        f"{escape(verdict.text)}{reason}</p>"
    )


def render_headline(verdict: Verdict) -> str:
    """Write a verdict without its reason, as a line of a list.

    Example:
        >>> render_headline(Verdict("bad", "No.", "It is so."))
        '<span class="verdict bad"><b>✕ Problem</b> No.</span>'
    """
    return (
        f'<span class="verdict {verdict.tone}"><b>{_WORDS[verdict.tone]}</b> '
        f"{escape(verdict.text)}</span>"
    )


# No script and no fetching, even if an escape were forgotten.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def render_page(
    title: str, subtitle: str, links: Sequence[tuple[str, str]], sections: Sequence[str]
) -> str:
    """Put sections under a heading and a list of links to them."""
    body = "\n".join(sections)
    listed = "".join(f'<a href="#{escape(key)}">{escape(text)}</a>' for key, text in links)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p></header>
<nav>{listed}</nav>
<main>
{body}
</main>
</body>
</html>
"""


def render_section(heading: str, *parts: str, key: str = "") -> str:
    """Put HTML parts under a heading.

    Args:
        heading: plain text.
        *parts: HTML.
        key: where links point to; "" for nowhere.

    Example:
        >>> print(render_section("a < b", "<p>x</p>", key="ab"))
        <section id="ab">
        <h2>a &lt; b</h2>
        <p>x</p>
        </section>
    """
    place = f' id="{escape(key)}"' if key else ""
    return "\n".join([f"<section{place}>", f"<h2>{escape(heading)}</h2>", *parts, "</section>"])


def render_columns(parts: Sequence[str]) -> str:
    """Put HTML parts beside each other where there is room."""
    return f'<div class="columns">{"".join(parts)}</div>' if parts else ""


def render_card(heading: str, body: str) -> str:
    """Frame HTML under a heading."""
    return f'<div class="card"><h3>{escape(heading)}</h3>{body}</div>'


def render_table_card(
    heading: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str = "",
    *,
    is_wordy: bool = False,
) -> str:
    """Frame a table of plain texts.

    Args:
        heading: plain text.
        columns: headings; no heading row if empty.
        rows: cells.
        note: plain text below it; "" for none.
        is_wordy: whether cells are long words, which may be broken anywhere.
    """
    below = f'<p class="soft">{escape(note)}</p>' if note else ""
    table = render_table(columns, rows)
    return render_card(
        heading, (f'<div class="words">{table}</div>' if is_wordy else table) + below
    )


def render_multiples(heading: str, panels: Sequence[tuple[str, str]], caption: str) -> str:
    """Frame small drawings of the same kind."""
    drawings = "".join(f"<div>{svg}<p>{escape(title)}</p></div>" for title, svg in panels)
    return (
        f'<figure class="wide"><h3>{escape(heading)}</h3><div class="multiples">{drawings}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def render_list(items: Sequence[str]) -> str:
    """Write HTML items as a list."""
    return f'<ul class="plain">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def render_missing(text: str) -> str:
    """Say that a part is missing, and why."""
    return f'<p class="missing">{escape(text)}</p>'


def render_figure(heading: str, svg: str | None, caption: str, *, missing: str) -> str:
    """Frame a drawing, or say why there is none.

    Args:
        heading: plain text.
        svg: trusted SVG, or None.
        caption: what to see in it, plain text.
        missing: what to say instead of a drawing, plain text.
    """
    if svg is None:
        return render_card(heading, render_missing(missing))
    return (
        f"<figure><h3>{escape(heading)}</h3>\n{svg}\n"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def render_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table of plain texts."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = [f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows]
    heading = f"<thead><tr>{head}</tr></thead>" if columns else ""
    return f'<div class="scroll"><table>{heading}<tbody>{"".join(lines)}</tbody></table></div>'


def render_details(summary: str, text: str) -> str:
    """Fold away a plain text."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _cell(text: str) -> str:
    first, _, rest = text.partition("\n")
    return escape(first) + (f"<small>{escape(rest)}</small>" if rest else "")


@dataclass(frozen=True)
class Section:
    """One question that the report answers."""

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
