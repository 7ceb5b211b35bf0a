"""Warnings: those our modules cause are errors in tests, those of other packages never are."""

import ast
import warnings
from pathlib import Path

import pytest
from typing_extensions import deprecated

import dist_siglip

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
    assert callers == {"renamed.py"}
