"""The files that docs/architecture.md lists for a batch are those that a training step runs."""

import re
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

import dist_siglip
from dist_siglip.cli.run.training import train
from tests.support.command import REPOSITORY, write_settings

PACKAGE = Path(dist_siglip.__file__).parent
_STEPS = 6  # the first builds what later ones reuse, the last evaluates


def named_between(mark: str) -> list[str]:
    """Files and folders in backticks between two comments of the page."""
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    return re.findall(r"`([\w/]+(?:\.py|/))`", page.split(f"<!-- {mark} -->")[1].split("<!--")[0])


@pytest.fixture
def files_of_the_steps(tmp_path, monkeypatch):
    """Files of the package of which any function was called in later steps of ``fit``."""
    files = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            files.add(path.relative_to(PACKAGE).as_posix())

    advance, steps = _TrainingEpochLoop.advance, iter(range(_STEPS))

    def traced(*arguments):
        sys.setprofile(note if 0 < next(steps) < _STEPS - 1 else None)
        try:
            return advance(*arguments)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", traced)
    settings = write_settings(tmp_path, max_steps=_STEPS)
    train(["fit", "--config", str(settings), "--checkpoint.every_steps", "100"])
    return files


@pytest.mark.e2e
def test_a_step_runs_the_files_that_the_page_lists_and_no_others(files_of_the_steps):
    path = named_between("batch path")
    beside = named_between("beside the batch path")
    assert len(path) == len(set(path))
    others = {file for file in files_of_the_steps if not file.startswith(tuple(beside))}
    assert others == set(path)
