"""Every text that reaches the page is escaped where it is put in."""

from dist_siglip.report.page import (
    Verdict,
    render_card,
    render_details,
    render_figure,
    render_headline,
    render_missing,
    render_multiples,
    render_page,
    render_section,
    render_table,
    render_table_card,
    render_verdict,
)
from dist_siglip.report.records import Picture
from dist_siglip.report.sections.retrieval import Answer, Exhibit, render_gallery

RAW = "<i>\"'&"
ESCAPED = "&lt;i&gt;&quot;&#x27;&amp;"


def test_all_parts_escape_their_texts():
    exhibit = Exhibit(Picture(0, RAW), RAW, [Answer(RAW, 0.5, is_right=False)])
    for html in (
        render_page(RAW, RAW, [(RAW, RAW)], []),
        render_section(RAW, key=RAW),
        render_card(RAW, ""),
        render_table_card(RAW, [], [], note=RAW),
        render_multiples(RAW, [(RAW, "<svg></svg>")], RAW),
        render_verdict(Verdict("good", RAW, RAW), RAW),
        render_headline(Verdict("good", RAW, RAW)),
        render_missing(RAW),
        render_figure(RAW, "<svg></svg>", RAW, missing=""),
        render_figure(RAW, None, "", missing=RAW),
        render_table([RAW], [[f"{RAW}\n{RAW}"]]),
        render_gallery(RAW, [exhibit], RAW),
        render_details(RAW, RAW),
    ):
        assert RAW not in html
        assert html.count(ESCAPED) >= 1


def test_second_line_of_a_cell_is_small():
    assert "<td>margin<small>half the gap</small></td>" in render_table(
        (), [["margin\nhalf the gap"]]
    )


def test_table_without_columns_has_no_head():
    assert "thead" not in render_table((), [["a"]])
