"""The command ``report``: where the page goes, and what is refused in one line."""

import pytest

from dist_siglip.cli import main


@pytest.fixture
def runs(tmp_path):
    """Two runs that have just begun."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "train/loss": 2.5}\n')
    return folders


def test_the_page_of_a_run_lies_in_its_folder(runs, capsys):
    assert main(["report", str(runs[0])]) == 0
    assert (runs[0] / "report.html").is_file()
    assert capsys.readouterr().out == f"wrote {runs[0]}/report.html\n"


def test_the_page_of_several_runs_lies_where_one_is(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, runs)]) == 0
    assert "Runs a, b" in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_told_in_one_line(runs, tmp_path, capsys):
    assert main(["report", str(runs[0]), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"out ({tmp_path}) cannot be written (Is a directory); name another file" in line


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["a", "--ouut", "x"]])
def test_mistakes_are_told_in_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
