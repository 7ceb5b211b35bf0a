"""A class path may name a file in the working directory, and nothing else there is imported."""

import importlib
import sys

import pytest
from torch import nn

from dist_siglip.cli.parser import CommandParser
from dist_siglip.errors import UserError

LOSS = """
import torch

class Own(torch.nn.Module):
    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a console script: not on sys.path."""
    monkeypatch.chdir(tmp_path)
    others = [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", others)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("own_", "bystander")):
            del sys.modules[name]


def _parse(*arguments):
    parser = CommandParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--loss", type=nn.Module)
    return parser.instantiate_classes(parser.parse_args(list(arguments))).loss


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("way", ["option", "config", "package"])
def test_a_class_of_a_file_here_is_found(folder, way):
    name = f"own_{way}"
    if way == "package":
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
        (folder / name / "losses.py").write_text(LOSS)
        loss = _parse(f"--loss={name}.losses.Own", "--loss.weight=3")
    else:
        (folder / f"{name}.py").write_text(LOSS)
        config = f"loss: {{class_path: {name}.Own, init_args: {{weight: 3}}}}"
        (folder / "c.yaml").write_text(config)
        given = {"option": [f"--loss={name}.Own", "--loss.weight=3"], "config": ["--config=c.yaml"]}
        loss = _parse(*given[way])
    assert (type(loss).__name__, loss.weight) == ("Own", 3.0)
    assert sys.path[-1] == str(folder)  # for processes that are started later
    assert [type(finder).__name__ for finder in sys.meta_path].count("_Finder") == 0


def test_nothing_that_is_not_named_is_imported_and_nothing_installed_is_hidden(folder):
    (folder / "torch.py").write_text("raise RuntimeError('imported')")
    (folder / "bystander.py").write_text("raise RuntimeError('imported')")
    before = list(sys.path)
    assert type(_parse("--loss=torch.nn.Identity")) is nn.Identity
    assert sys.path == before
    assert "bystander" not in sys.modules
    with pytest.raises(UserError):
        _parse("--loss=own_missing.Own")
