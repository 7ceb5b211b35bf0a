"""The HTML of the report: one file, no script, nothing fetched, every text escaped."""

from collections.abc import Sequence
from html import escape

from dist_siglip.report.gallery import Answer, Exhibit

# No script and no fetching, even if an escape were forgotten.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1d2125; --soft: #5b646e;
  --line: #dfe3e6; --right: #1a7f4b; --wrong: #b3362b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1c2024; --ink: #e6e8ea; --soft: #a0a9b2; --line: #333a41;
    --right: #4cc38a; --wrong: #ff8b7e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { margin: .4rem 0; max-width: 75ch; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.missing { border-left: 3px solid var(--line); padding-left: .75rem; color: var(--soft); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 1rem; align-items: start; }
.stack { display: grid; gap: 1rem; min-width: 0; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem; margin: 0; min-width: 0; }
figure h2, .card h2 { margin: 0 0 .5rem; font-size: 1.05rem; }
figure svg { display: block; width: 100%; height: auto; max-height: 30rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; overflow-wrap: normal; }
td:last-child, th:last-child { padding-right: 0; }
td:not(:first-child) { white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; overflow-wrap: normal; }
td small { display: block; color: var(--soft); line-height: 1.35; }
.gallery { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); }
.gallery img { display: block; width: 100%; height: 150px; object-fit: contain;
  background: #8883; border-radius: 6px; image-rendering: pixelated; }
.gallery h3 { font-size: 1rem; margin: .6rem 0 .3rem; }
.gallery ol { margin: 0; padding-left: 1.4rem; font-size: .92rem; }
.gallery li b { font-weight: 600; }
.right b { color: var(--right); } .wrong b { color: var(--wrong); }
pre { overflow-x: auto; font-size: .82rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: .75rem; white-space: pre-wrap; }
summary { cursor: pointer; }
@media (max-width: 600px) { body { padding: 1rem .75rem 3rem; }
  th, td { padding: .3rem .25rem; } .stack { display: grid; gap: 1rem; min-width: 0; }
.card, figure { padding: .75rem; } }
"""


def render_page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """Put sections under a heading.

    Args:
        title: plain text.
        subtitle: plain text.
        sections: HTML.
    """
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p></header>
<main>
{body}
</main>
</body>
</html>
"""


def render_section(heading: str, *parts: str) -> str:
    """Put HTML parts under a heading.

    Example:
        >>> print(render_section("a < b", "<p>x</p>"))
        <section>
        <h2>a &lt; b</h2>
        <p>x</p>
        </section>
    """
    return "\n".join(["<section>", f"<h2>{escape(heading)}</h2>", *parts, "</section>"])


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
        return f'<div class="card"><h2>{escape(heading)}</h2>{render_missing(missing)}</div>'
    return (
        f"<figure><h2>{escape(heading)}</h2>\n{svg}\n"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def render_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table of plain texts.

    Args:
        columns: headings; no heading row if empty.
        rows: cells. A newline in a cell begins a smaller second line.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = [f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows]
    heading = f"<thead><tr>{head}</tr></thead>" if columns else ""
    return f"<table>{heading}<tbody>{''.join(lines)}</tbody></table>"


def render_gallery(exhibits: Sequence[Exhibit]) -> str:
    """Show images with their answers, right and wrong by word and sign as well as colour."""
    return f'<div class="gallery">{"".join(_exhibit(exhibit) for exhibit in exhibits)}</div>'


def render_details(summary: str, text: str) -> str:
    """Fold away a plain text."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _cell(text: str) -> str:
    first, _, rest = text.partition("\n")
    return escape(first) + (f"<small>{escape(rest)}</small>" if rest else "")


def _exhibit(exhibit: Exhibit) -> str:
    answers = "".join(_answer(answer) for answer in exhibit.answers)
    return (
        f'<article class="card"><img src="{escape(exhibit.picture.data_uri)}" '
        f'alt="{escape(exhibit.caption)}"><h3>{escape(exhibit.caption)}</h3>'
        f"<ol>{answers}</ol></article>"
    )


def _answer(answer: Answer) -> str:
    kind, mark = ("right", "\N{CHECK MARK} right") if answer.is_right else (
        "wrong", "\N{MULTIPLICATION X} wrong"
    )  # fmt: skip
    return (
        f'<li class="{kind}"><b>{mark}</b> {escape(answer.caption)} '
        f'<span class="soft">{answer.similarity:.2f}</span></li>'
    )
