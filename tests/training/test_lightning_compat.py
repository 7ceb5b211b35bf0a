"""Every private name of Lightning stands in one module, is there, and is missed in one line."""

import re

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from dist_siglip.system import lightning_compat
from tests.support.command import REPOSITORY

NAMES = {name for _, name, _ in lightning_compat.PRIVATE if name.startswith("_")}


def test_all_private_names_are_there():
    lightning_compat.check()


@pytest.mark.parametrize("name", ["dump_checkpoint", "_save_distributed_checkpoint"])
def test_one_that_is_gone_is_one_line(name, monkeypatch):
    if name == "dump_checkpoint":
        monkeypatch.delattr(_CheckpointConnector, name)
    else:
        sources = lightning_compat.inspect.getsource
        monkeypatch.setattr(
            lightning_compat.inspect,
            "getsource",
            lambda of: "" if of is ModelParallelStrategy else sources(of),
        )
        monkeypatch.delattr(ModelParallelStrategy, name, raising=False)
    with pytest.raises(RuntimeError, match=r"Lightning has no \S+ any more, which") as caught:
        lightning_compat.check()
    assert "\n" not in str(caught.value)


def test_no_other_module_touches_one():
    for path in (REPOSITORY / "dist_siglip").rglob("*.py"):
        if path.name == "lightning_compat.py":
            continue
        text = path.read_text(encoding="utf-8")
        touched = set(re.findall(r"(?:trainer|strategy|loop|module|self)\.(_\w+)", text)) & NAMES
        touched |= {name for name in NAMES if f'"{name}"' in text}
        # ProcessGroup's options have a limit of the same name (distributed/groups.py).
        touched -= {"_timeout"} if path.name == "groups.py" else set()
        assert not touched, (path, touched)
        assert not re.search(r"from lightning\S* import .*\b_\w", text), path


def test_the_bound_of_lightning_is_below_its_next_minor_release():
    settings = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'"lightning>=2\.6\.4,.*<2\.7"', settings)
