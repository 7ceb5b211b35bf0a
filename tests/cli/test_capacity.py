"""``capacity``: bounds for four numbers, and for what a run measured."""

import json
import shutil

import numpy as np
import pytest

from dist_siglip.cli import main

GIVEN = ["--pairs=1e10", "--dimension=768", "--margin=0.1", "--relative_bias=0"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")


@pytest.fixture
def run(tmp_path):
    """A run that was evaluated: overlapping pairs, means apart."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    metrics = {
        "step": 9,
        "gallery_pairs": 5000.0,
        "loss": 0.4,
        "guaranteed_recall@1": 0.0,
        "margin": -0.2,
        "relative_bias": 0.1,
        "margin_5_95": 0.02,
        "relative_bias_5_95": 0.05,
        "margin_of_means": 0.0695,
        "relative_bias_of_means": 0.068,
        "image_to_text_recall@1": 0.75,
        "text_to_image_recall@1": 0.5,
        "xi": "nan",
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    np.savez(folder / "arrays.npz", image_features=np.eye(3, 1152, dtype=np.float32))
    return tmp_path


def _json(capsys, *words):
    assert main(["capacity", *words, "--json=true"]) == 0
    return json.loads(capsys.readouterr().out)


def test_four_numbers_give_the_published_dimensions(capsys):
    facts = _json(capsys, *GIVEN)["margins"]["given"]
    assert (facts["dimensions_necessary"], facts["dimensions_sufficient"]) == (46, 89)
    assert facts["feasible"] is True
    assert facts["log10_pairs_bound"] == pytest.approx(168.7, abs=0.05)
    assert facts["dimensions_exact"] <= 46


def test_the_table_says_what_the_bound_allows(capsys):
    assert main(["capacity", *GIVEN]) == 0
    shown = capsys.readouterr().out
    assert "10,000,000,000 pairs, 768 dimensions" in shown
    assert "at d = 768 the bound allows 10^168.7 pairs at margin 0.1" in shown


def test_a_margin_that_cannot_be_is_an_answer(capsys):
    facts = _json(capsys, *GIVEN, "--margin=0.5")["margins"]["given"]
    assert facts["feasible"] is False
    assert "Theorem 3.4" in facts["problem"]
    assert main(["capacity", *GIVEN, "--margin=0.5"]) == 0
    assert "must be at most 0.3333" in capsys.readouterr().out


def test_a_margin_of_few_pairs_has_no_dimension(capsys):
    facts = _json(capsys, *GIVEN, "--pairs=3", "--margin=0.34")["margins"]["given"]
    assert facts["feasible"] is True
    assert "few pairs" in facts["problem"]
    assert "dimensions_necessary" not in facts


def test_a_run_is_described_at_each_of_its_margins(run, capsys):
    document = _json(capsys, f"--run_dir={run}")
    assert (document["pairs"], document["dimension"]) == (5000, 1152)
    strict, lenient, means = document["margins"].values()
    assert "above 0" in strict["problem"]
    assert "feasible" not in strict  # overlapping pairs are possible, and common
    assert lenient["margin"] == 0.02
    assert means["dimensions_necessary"] < lenient["dimensions_necessary"] * 10
    assert document["guaranteed_recall@1"] == 0.0


def test_what_a_run_shows_ends_with_what_its_loss_guarantees(run, capsys):
    assert main(["capacity", f"--run_dir={run}"]) == 0
    shown = capsys.readouterr().out
    assert "5,000 pairs, 1152 dimensions" in shown
    assert "means: at d = 1152 the bound allows 10^" in shown
    assert "guarantees recall@1 of 0.000 (nothing); measured: 0.500" in shown


def test_what_is_given_counts_before_the_run(run, capsys):
    document = _json(capsys, f"--run_dir={run}", "--pairs=1e9", "--dimension=64")
    assert (document["pairs"], document["dimension"]) == (1e9, 64)
    assert list(document["margins"]) != ["given"]
    document = _json(capsys, f"--run_dir={run}", "--margin=0.1", "--relative_bias=0")
    assert list(document["margins"]) == ["given"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs=1e9"], "give pairs, dimension, margin and relative_bias"),
        (["--margin=0.1", "--pairs=9"], "given together"),
        ([*GIVEN, "--pairs=1"], "at least 2"),
        ([*GIVEN, "--pairs=1e999"], "finite"),
        ([*GIVEN, "--dimension=0"], "dimension (0)"),
        ([*GIVEN, "--relative_bias=2"], "relative_bias (2.0)"),
        (["--run_dir=nowhere"], "has no evaluation"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, capsys):
    assert main(["capacity", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_without_arrays_is_asked_for_its_dimension(run, capsys):
    (run / "evaluation" / "arrays.npz").unlink()
    assert main(["capacity", f"--run_dir={run}"]) == 2
    assert "give --dimension" in capsys.readouterr().err


def measure_prefixes(run, prefix=-0.1, **more):
    """Write metrics of a prefix of 64 columns into an evaluation."""
    path = run / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    for way, margin in (("prefix", prefix), ("pca", 0.08)):
        measured = {"margin": margin, "relative_bias": 0.1, "margin_5_95": 0.05}
        measured |= {"relative_bias_5_95": 0.04, "modality_gap": 0.6}
        measured |= {f"{key}_recall@1": 0.4 for key in ("image_to_text", "text_to_image")}
        metrics |= {f"{way}_64_{name}": value for name, value in measured.items()}
    path.write_text(json.dumps(metrics | more))


def test_prefixes_that_were_measured_are_shown_with_their_bounds(run, capsys):
    measure_prefixes(run)
    ways = _json(capsys, f"--run_dir={run}")["prefixes"]["64"]
    assert (ways["prefix"]["margin"], ways["pca"]["margin"]) == (0.05, 0.08)
    assert ways["pca"]["modality_gap"] == 0.6
    assert ways["pca"]["log10_pairs_bound"] < ways["prefix"]["log10_pairs_bound"]
    assert main(["capacity", f"--run_dir={run}"]) == 0
    assert "in fewer dimensions" in capsys.readouterr().out


def test_prefixes_of_two_runs_stand_in_one_table(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    other = tmp_path / "nested"
    shutil.copytree(run, other)
    measure_prefixes(run)
    measure_prefixes(other, prefix=0.07)
    words = [f"--run_dir={run}", f"--compare={other}"]
    found = _json(capsys, *words)
    margins = [found[key]["64"]["prefix"]["margin"] for key in ("prefixes", "compare")]
    assert margins == [0.05, 0.07]
    assert main(["capacity", *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ ")]
    rows = [line.replace("│", "").split()[:3] for line in lines if "64" in line[:14]]
    assert rows == [["64", name, way] for name in (run.name, "nested") for way in ("prefix", "pca")]


@pytest.mark.parametrize("more", [{"gallery_pairs": 4000.0}, {"step": 7.0}])
def test_runs_of_other_evaluations_are_not_compared(run, tmp_path, capsys, more):
    other = tmp_path / "nested"
    shutil.copytree(run, other)
    measure_prefixes(other, **more)
    assert main(["capacity", f"--run_dir={run}", f"--compare={other}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"was evaluated with {next(iter(more))} {next(iter(more.values()))}" in line
    assert main(["capacity", *GIVEN, f"--compare={other}"]) == 2
    assert "stands beside run_dir" in capsys.readouterr().err
