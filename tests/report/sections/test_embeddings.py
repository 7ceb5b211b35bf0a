"""Recall of quantised rows and of indexes on the page, from what ``embed`` measured."""

import json

import pytest

from dist_siglip.cli import main
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.nearest_index import note_metrics
from dist_siglip.report import write_report
from dist_siglip.report.sections.embeddings import judge, make
from tests.support.run_folder import write_run

ROWS = {"dtype": "int8", "rows": 5_000, "queries": 256, "query_tower": "text"}
RECALL = {"recall@1": 0.974, "recall@10": 0.991}
INDEX = {"kind": "ivf_pq", "unscored_recall@10": 0.812, "recall@10": 0.5, "recall@100": 0.25}


def embedded(folder, **measured):
    folder.mkdir(parents=True)
    (folder / "embed.json").write_text("{}")
    for name, numbers in measured.items():
        note_metrics(folder, name, numbers)
    return folder


@pytest.mark.parametrize(
    ("found", "tone"), [(0.95, "good"), (0.949, "note"), (0.8, "note"), (0.79, "watch")]
)
def test_recall_of_ten_is_judged(found, tone):
    verdict = judge("rows", {**ROWS, "recall@10": found})
    assert verdict.tone == tone
    assert f"int8 rows: {100 * found:.1f} % of the exact ten" in verdict.text
    assert bool(verdict.reason) == (tone != "good")
    assert judge("rows", ROWS).tone == "unknown"


def test_a_folder_alone_has_a_page_in_it(tmp_path, capsys):
    folder = embedded(tmp_path / "emb", rows=ROWS | RECALL, index=ROWS | INDEX)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    assert "<h1>Embeddings emb</h1>" in page
    for cell in ("int8 rows", "ivf-pq index", "256 texts", "5,000", "0.9740", "0.8120", "0.2500"):
        assert f"<td>{cell}</td>" in page or f'<th scope="col">{cell}</th>' in page
    assert "99.1 % of the exact ten nearest" in page
    assert "50.0 % of the exact ten nearest" in page
    assert page.count("<td>-</td>") == 3  # recall@1 of the index; two of the rows
    assert main(["report", str(folder)]) == 0  # a folder with a page in it is one still


def test_runs_and_folders_stand_on_one_page(tmp_path):
    run = write_run(tmp_path / "run")
    folders = [embedded(tmp_path / "a", rows=ROWS | RECALL), embedded(tmp_path / "b")]
    page = write_report(run, *folders, out=tmp_path / "page.html").read_text()
    assert "<h1>Run run</h1>" in page
    assert "At a glance" in page
    assert '<i class="run">a</i> int8 rows: 99.1 %' in page
    assert '<i class="run">b</i> Nothing was measured' in page
    assert "Search in embeddings" not in write_report(run).read_text()


def test_damaged_figures_are_left_out(tmp_path):
    folder = embedded(tmp_path / "emb", rows=ROWS | RECALL)
    content = json.loads((folder / "metrics.json").read_text())
    for name, damage in (("x", None), ("y", {"rows": "<b>"}), ("z", ROWS | {"recall@1": "1"})):
        content[name] = damage
    (folder / "metrics.json").write_text(json.dumps(content))
    html = make({"emb": folder}).render()
    assert html.count("verdict") == 1
    (folder / "metrics.json").write_text("{")
    assert "Nothing was measured" in make({"emb": folder}).render()
    assert make({}) is None


def test_a_folder_of_neither_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
