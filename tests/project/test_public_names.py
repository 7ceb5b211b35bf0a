"""The names at the root: complete, documented, the same objects as in their packages, and lazy."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import dist_siglip
from tests.support.command import REPOSITORY, environment


def names_shown_to_type_checkers():
    """(package, name) of every import that stands under ``TYPE_CHECKING``."""
    tree = ast.parse((REPOSITORY / "dist_siglip/__init__.py").read_text(encoding="utf-8"))
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(branch.test) == "TYPE_CHECKING"
    return {(each.module, alias.name) for each in branch.body for alias in each.names}


def test_what_is_listed_is_what_type_checkers_see_and_what_is_imported():
    shown = names_shown_to_type_checkers()
    assert {(package, name) for name, package in dist_siglip._PACKAGE_OF.items()} == shown
    assert sorted(name for _, name in shown) == dist_siglip.__all__


@pytest.mark.parametrize("name", dist_siglip.__all__)
def test_a_name_is_the_object_of_its_package_public_there_and_documented(name):
    package = import_module(dist_siglip._PACKAGE_OF[name])
    value = getattr(dist_siglip, name)
    assert value is getattr(package, name)
    assert name in package.__all__
    assert len(inspect.getdoc(value).splitlines()[0]) > 20


def test_the_root_imports_nothing_before_a_name_is_used():
    script = (
        "import sys; before = set(sys.modules)\n"
        "import dist_siglip\n"
        "assert set(dist_siglip.__all__) <= set(dir(dist_siglip)), dir(dist_siglip)\n"
        "assert dist_siglip.__version__ and dist_siglip.UserError.__name__ == 'UserError'\n"
        "ours = {name for name in set(sys.modules) - before if name.startswith('dist_siglip')}\n"
        "known = ('', '.errors', '.system', '.system.moved')\n"
        "assert ours == {f'dist_siglip{name}' for name in known}, ours\n"
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())


def test_a_name_that_is_not_there_is_missing_as_ever():
    with pytest.raises(AttributeError, match="'dist_siglip' has no attribute 'no_such_name'"):
        dist_siglip.no_such_name  # noqa: B018 - the access is what is tested
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from dist_siglip import no_such_name")
