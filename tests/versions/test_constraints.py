"""The tested versions are those that pyproject.toml allows, and the commands install them."""

import ast
import re
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.command import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]
PINS = [
    Requirement(line)
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]

_LOADER = SourceFileLoader("versions_run", str(REPOSITORY / "tests/versions/run"))
SCRIPT = module_from_spec(spec_from_loader("versions_run", _LOADER))
_LOADER.exec_module(SCRIPT)


def test_every_direct_dependency_has_a_pin_within_its_bounds():
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in PINS}
    for needed in REQUIREMENTS:
        pinned = versions[canonicalize_name(needed.name)]
        assert pinned.startswith("=="), needed
        assert needed.specifier.contains(pinned.removeprefix("==")), f"{needed}: {pinned}"


def test_nothing_is_pinned_that_torch_pins_itself():
    assert [p.name for p in PINS if re.match(r"nvidia|cuda|triton|dist.siglip", p.name)] == []


def test_one_package_has_the_same_bounds_in_every_extra():
    bounds = {}
    for needed in REQUIREMENTS:
        bounds.setdefault(canonicalize_name(needed.name), set()).add(str(needed.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_the_commands_that_install_the_tests_use_the_tested_versions(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    commands = re.findall(r"pip install .*-e \"\.\[dev\]\".*", text)
    assert commands
    assert all("-c constraints.txt" in command for command in commands)


def test_a_package_whose_private_names_are_imported_has_an_upper_bound():
    bounded = {
        canonicalize_name(needed.name)
        for needed in REQUIREMENTS
        if any(one.operator == "<" for one in needed.specifier)
    }
    touched = set()
    for path in (REPOSITORY / "dist_siglip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                words = [*node.module.split("."), *(alias.name for alias in node.names)]
                if any(re.match(r"_[a-z]", word, re.IGNORECASE) for word in words):
                    touched.add(canonicalize_name(words[0]))
    touched -= {"dist-siglip", *map(canonicalize_name, sys.stdlib_module_names)}
    assert touched >= {"torch", "huggingface-hub"}
    assert touched <= bounded


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        ("....\n4 passed in 3.10s\n", "4 passed"),
        (
            "F.\n1 failed, 1 passed, 2 skipped, 20 warnings in 205.10s (0:03:25)\n",
            "1 failed, 1 passed, 2 skipped",
        ),
        ("usage: pytest\n", "error 4"),
    ],
)
def test_the_script_reads_what_pytest_counted(output, counts):
    assert SCRIPT.counts_of(output, 4) == counts


def test_the_page_has_a_row_for_each_set_of_versions():
    page = SCRIPT.PAGE.read_text(encoding="utf-8")
    head = next(line for line in page.splitlines() if line.startswith("| versions |"))
    columns = ["versions", "Python", *SCRIPT.PACKAGES, *SCRIPT.TESTS]
    assert [cell.strip() for cell in head.strip("|").split("|")] == columns
    for name in SCRIPT.HOW:
        assert re.search(rf"^\| {name} \|", page, re.MULTILINE)
