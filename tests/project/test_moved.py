"""Public names work under their old paths, with a warning, in code and in YAML."""

import importlib
import re
import subprocess
import sys
import warnings

import pytest

from dist_siglip.cli.parser import CommandParser
from dist_siglip.runs import describe_differences
from dist_siglip.system.moved import NAMES, PACKAGES, new_path
from dist_siglip.training.callbacks import SkipBadSteps
from tests.support.command import REPOSITORY, environment
from tests.support.old_names import PUBLIC


@pytest.mark.parametrize("package", PUBLIC)
def test_every_old_public_name_is_there(package):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = importlib.import_module(package)
        for name in PUBLIC[package]:
            said.clear()
            value = getattr(module, name)
            new_package, _, new_name = new_path(f"{package}.{name}").rpartition(".")
            assert value is getattr(importlib.import_module(new_package), new_name), name
            told = [each for each in said if each.category is DeprecationWarning]
            told = [str(each.message) for each in told if "dist_siglip" in str(each.message)]
            assert bool(told) == (new_path(f"{package}.{name}") != f"{package}.{name}"), name
            assert not told or f"is now {new_package}.{new_name}" in told[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_never_was_is_missing(package):
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module(package).no_such_name  # noqa: B018 - the access is tested
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{package}.no_such_module")


def test_old_class_paths_work_in_yaml():
    parser = CommandParser()
    parser.add_argument("--callback", type=SkipBadSteps)
    with pytest.warns(DeprecationWarning, match="is now"):
        found = parser.parse_args(["--callback=dist_siglip.callbacks.StepGuard"])
    assert isinstance(parser.instantiate(found).callback, SkipBadSteps)


def test_a_run_is_the_same_under_the_old_and_the_new_path_of_a_class():
    def settings(path):
        return {"model": {"loss": {"class_path": path}}}

    one = settings("dist_siglip.losses.SigLipLoss")
    assert describe_differences(one, settings("dist_siglip.SigLipLoss")) == []
    assert describe_differences(one, settings("dist_siglip.losses.ClipLoss"))
    assert describe_differences(one, settings("mine.SigLipLoss"))


def test_the_table_of_the_changelog_is_the_code():
    page = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(dist_siglip[\w.]+)` \| `(dist_siglip[\w.]+)` \|$", page, re.M))
    renamed = {old: f"{old.rpartition('.')[0]}.{new}" for old, new in NAMES.items()}
    back = {new: old for old, new in PACKAGES.items()}
    renamed = {
        f"{back.get(old.rpartition('.')[0], old.rpartition('.')[0])}.{old.rpartition('.')[2]}": new
        for old, new in renamed.items()
    }
    assert shown == {**PACKAGES, **renamed}


def test_old_paths_cost_nothing_before_they_are_used():
    script = (
        "import sys; before = set(sys.modules)\n"
        "import dist_siglip.callbacks\n"
        "assert not {'torch', 'lightning', 'numpy'} & (set(sys.modules) - before)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())
