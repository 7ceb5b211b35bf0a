"""Warnings of other packages fail no test and reach no user; those we cause are errors in tests."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typing_extensions import deprecated

import dist_siglip
from tests.support.command import REPOSITORY, environment

OTHERS = ("lightning.pytorch.trainer", "torch.distributed.fsdp", "PIL.Image", "dist_siglip_tools")
RENAMED = {"all_gather_into_tensor", "reduce_scatter_tensor"}


@deprecated("Use `new_name` instead.", category=FutureWarning)
def old_name():
    """What a package leaves behind when it renames a function."""


def call_from(module):
    """Call the old name from a line of ``module``."""
    exec(compile("old_name()", f"{module}.py", "exec"), {"__name__": module, "old_name": old_name})


@pytest.mark.parametrize("module", OTHERS)
def test_a_warning_of_another_package_fails_no_test(module):
    with warnings.catch_warnings(record=True) as said:
        call_from(module)
    assert [str(warning.message) for warning in said] == ["Use `new_name` instead."]


def test_a_deprecated_call_of_ours_is_an_error():
    with pytest.raises(FutureWarning, match="new_name"):
        call_from("dist_siglip.losses.sigmoid")


def test_one_place_calls_what_torch_renamed():
    callers = {
        path.name
        for path in Path(dist_siglip.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in RENAMED
    }
    assert callers == {"combine.py"}


def command_says(*options, **variables):
    """Return the lines on stderr of a command that warns in each kind of process."""
    done = subprocess.run(
        [sys.executable, *options, "-m", "tests.support.warning_command"],
        capture_output=True,
        text=True,
        env={**environment(), **variables},
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_a_user_hears_of_their_own_files_and_of_what_matters():
    told = [line for name in ("main", "forked") for line in expected_lines(name)]
    assert command_says() == told


def expected_lines(process):
    return (
        f"CUDA initialization: driver too old in {process}",
        f"/home/me/stages.py:3: UserWarning: odd picture in {process}",
    )


@pytest.mark.parametrize(
    ("options", "variables"),
    [(["-W", "always"], {}), ([], {"PYTHONWARNINGS": "always"})],
    ids=["option", "variable"],
)
def test_what_the_user_asks_of_python_wins(options, variables):
    text = "\n".join(command_says(*options, **variables))
    for process in ("main", "forked", "spawned"):
        assert text.count(f"FutureWarning: old name in {process}") == 2


def test_a_user_who_wants_no_warnings_gets_none():
    assert command_says("-W", "ignore") == []
