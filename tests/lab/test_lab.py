"""Experiments run, here or in processes of their own, and what came out is kept whole."""

import json
import math
from concurrent.futures import Future

import pytest

from dist_siglip.cli import main
from dist_siglip.errors import UserError
from dist_siglip.lab import LabSettings, Row, running
from dist_siglip.lab.experiments import EXPERIMENTS, Entry
from dist_siglip.lab.running import (
    LabRun,
    _finished,
    markdown_table,
    read_records,
    run_experiments,
    write_page,
    write_record,
)
from tests.support import lab_experiment


@pytest.fixture
def catalogue():
    """One experiment, that takes no time; behind it all others, in their order."""
    every = dict(EXPERIMENTS)
    EXPERIMENTS.clear()
    EXPERIMENTS["tiny"] = Entry("tests.support.lab_experiment", "is anything off?", 0.1, "metrics")
    yield
    EXPERIMENTS.clear()
    EXPERIMENTS.update(every)


def lab(*words, out):
    return main(["lab", *words, "--out", str(out), "--workers", "1"])


def test_a_record_reads_back_as_it_was_written(catalogue, tmp_path):
    outcome = lab_experiment.run(LabSettings(seed=7))
    written = write_record(tmp_path, "tiny", outcome, quick=True, seed=7, cpu_seconds=1.26)
    (found,) = read_records(tmp_path)
    assert math.isnan(found.rows[1].ours)
    assert [row for row in found.rows if row.ours == row.ours] == [
        row for row in written.rows if row.ours == row.ours
    ]
    assert (found.name, found.notes, found.quick, found.cpu_seconds) == (
        "tiny",
        ("a note",),
        True,
        1.3,
    )
    assert found.counts == {
        "reproduced": 1,
        "corrected": 1,
        "differs": 1,
        "no published value": 1,
    }


def test_files_are_json_and_drawings_and_the_same_each_time(catalogue, tmp_path):
    outcome = lab_experiment.run(LabSettings())
    for folder in ("a", "b"):
        write_record(tmp_path / folder, "tiny", outcome, quick=False, seed=0, cpu_seconds=1)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        for folder in ("a", "b")
    )
    assert set(first) == {"tiny.json", "tiny.svg"}
    assert first == second
    assert b"NaN" not in first["tiny.json"]
    assert b"<svg" in first["tiny.svg"]


def test_the_page_shows_every_record_with_table_and_drawing(catalogue, tmp_path):
    outcome = lab_experiment.run(LabSettings())
    write_record(tmp_path / "lab", "tiny", outcome, quick=True, seed=0, cpu_seconds=2)
    summary = write_page(tmp_path / "lab").read_text()
    row = "| [tiny](lab/metrics.md#tiny) (quick) | is anything off? | 0 | 1 | 2 | 1 | 2 |"
    assert row in summary
    assert [path.name for path in tmp_path.glob("lab/*.md")] == ["metrics.md"]
    page = (tmp_path / "lab/metrics.md").read_text()
    assert "![tiny](tiny.svg)" in page
    assert "| off | 1 | 2 | 0.5 | differs |" in page
    assert r"| seed \| as told | 7 | 0 | 0 | differs |" in page
    assert "- a note" in page


def test_what_stands_above_the_written_part_of_the_page_is_kept(catalogue, tmp_path):
    outcome = lab_experiment.run(LabSettings())
    write_record(tmp_path / "lab", "tiny", outcome, quick=True, seed=0, cpu_seconds=2)
    first = write_page(tmp_path / "lab").read_text()
    (tmp_path / "lab.md").write_text(first.replace("# The lab", "# Ours"))
    assert write_page(tmp_path / "lab").read_text() == first.replace("# The lab", "# Ours")


def test_a_table_shows_four_digits_of_what_was_measured():
    table = markdown_table([Row("loss", "zero", 1.23456e-7, None, "reproduced")])
    assert table.splitlines()[-1] == "| loss | zero | 1.235e-07 |  | reproduced |"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [{}], "notes": []}'])
def test_a_file_that_is_no_record_is_named(catalogue, tmp_path, content):
    (tmp_path / "tiny.json").write_text(content)
    with pytest.raises(UserError, match=r"tiny\.json is no record of the lab; remove it"):
        read_records(tmp_path)


def test_a_process_of_its_own_gives_the_same_numbers_and_tells_how_far_it_is(tmp_path):
    rows, told = [], []
    for workers in (1, 2):
        order = LabRun(["constructions"], tmp_path / str(workers), quick=True)
        (record,) = run_experiments(
            order, workers=workers, on_progress=lambda *message: told.append(message)
        )
        rows.append(record.rows)
    assert rows[0] == rows[1]
    assert told == [("constructions", 1.0)] * 2


def test_an_experiment_that_fails_is_told_after_the_others():
    futures = [Future() for _ in range(3)]
    futures[0].set_exception(ArithmeticError("of the experiment"))
    futures[1].set_result("first")
    looks = []

    def look():
        looks.append(None)
        if len(looks) == 2:
            futures[2].set_result("second")

    results = _finished(set(futures), look)
    assert [next(results), next(results)] == ["first", "second"]
    with pytest.raises(ArithmeticError, match="of the experiment"):
        next(results)


def test_a_name_given_twice_is_run_once(catalogue, tmp_path):
    order = LabRun(["tiny", "tiny"], tmp_path)
    assert len(list(run_experiments(order, workers=1, on_progress=lambda *message: None))) == 1


class PoolThatTells:
    """Instead of running an experiment, its result is how many processes it may compute in."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass

    def submit(self, run, name, lab_run, processes):
        future = Future()
        future.set_result(processes)
        return future


@pytest.mark.parametrize(
    ("names", "workers", "processes"),
    [
        (["parity"], 2, [2]),
        (["parity", "separator"], 2, [1, 1]),
        (["parity", "separator", "modalities"], 2, [1, 1, 1]),
        (["parity", "separator"], 5, [2, 2]),
    ],
)
def test_fewer_experiments_than_workers_compute_in_several(
    names, workers, processes, tmp_path, monkeypatch
):
    monkeypatch.setattr(running, "ProcessPoolExecutor", PoolThatTells)
    order = LabRun(names, tmp_path)
    found = run_experiments(order, workers=workers, on_progress=lambda *message: None)
    assert list(found) == processes


def test_the_seed_reaches_the_experiment(catalogue, tmp_path):
    order = LabRun(["tiny"], tmp_path, seed=7)
    (record,) = run_experiments(order, workers=1, on_progress=lambda *message: None)
    assert record.rows[0].verdict == "reproduced"
    assert record.seed == 7


def test_a_number_that_differs_is_exit_code_1(catalogue, tmp_path, capsys):
    assert lab("all", out=tmp_path / "out") == 1
    shown = capsys.readouterr().out
    assert "corrected: it is below" in " ".join(shown.replace("│", " ").split())
    assert (tmp_path / "out.md").is_file()


def test_results_are_printed_as_json(tmp_path, capsys):
    assert lab("run", "constructions", "--json", "true", out=tmp_path / "out") == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["name"] == "constructions"
    assert {"quantity", "published", "ours", "tolerance", "verdict"} == set(shown["rows"][0])


def test_the_catalogue_is_listed(capsys):
    assert main(["lab", "list", "--json", "true"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == list(EXPERIMENTS)
    assert main(["lab", "list"]) == 0
    assert "five_starts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["run", "five_start"], "no experiment 'five_start'; did you mean five_starts?"),
        (["run", '["separator", "x"]'], "no experiment 'x'"),
        (["all", "--workers", "0"], "workers (0) must be at least 1"),
        (["fly"], "lab (fly) must be one of list, run, all"),
    ],
)
def test_mistakes_are_one_line_and_code_2(words, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["lab", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert list(tmp_path.iterdir()) == []
