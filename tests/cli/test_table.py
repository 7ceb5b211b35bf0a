"""Paths are printed whole, on lines of their own, however narrow the terminal is."""

import ast
from pathlib import Path

import pytest

from dist_siglip.cli import table

DEEP = "a folder with [brackets]/" + "deeper/" * 20 + "report.html"


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")


def test_a_path_is_one_line_and_comes_as_it_is(capsys):
    table.print_path("report", Path(DEEP))
    assert capsys.readouterr().out == f"report: {DEEP}\n"


@pytest.mark.parametrize(
    "module", ["run/quickstart", "lab_run", "data/shards", "embed", "run/testing", "align"]
)
def test_no_table_holds_a_path_that_a_verb_prints(module):
    """What ``print_path`` gets is in no cell, title or caption of the same module."""
    tree = ast.parse((Path(table.__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    printed = {ast.unparse(c.args[1]) for c in calls if ast.unparse(c.func) == "print_path"}
    assert printed
    for call in calls:
        name = ast.unparse(call.func).split(".")[-1]
        if name in ("Table", "add_row"):
            words = ast.unparse(call)
            assert not [path for path in printed if f"{{{path}}}" in words or f"({path}" in words]
