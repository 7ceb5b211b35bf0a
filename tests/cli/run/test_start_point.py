"""Where a start begins: in the folder of its configuration, past what is damaged there."""

import json
import os

import pytest

from dist_siglip.cli.run import start_point
from dist_siglip.cli.run.start_point import (
    check_same_run,
    evaluated_step,
    folder_to_run_in,
    set_aside_unreadable,
)
from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder

SETTINGS = {"seed_everything": 0, "model": {"model": "tiny"}}


@pytest.fixture(autouse=True)
def _told_anew():
    start_point._warn_once.cache_clear()


@pytest.fixture
def run(tmp_path):
    """A run folder whose configuration names the folder itself."""
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.checkpoint(4).touch()
    folder.config.write_text(json.dumps(SETTINGS | {"run_dir": str(folder.path)}))
    return folder


def chosen(run_dir, *configs, is_given=False):
    return folder_to_run_in(str(run_dir), configs, is_given=is_given)


def test_a_copied_or_moved_run_goes_on_where_it_is(run, tmp_path, caplog):
    """Before, its configuration sent the start to the folder it was made in."""
    moved = run.path.rename(tmp_path / "moved")
    assert chosen(run.path, moved / "config.yaml") == str(moved)
    assert f"run_dir is {moved}" in caplog.messages[-1]
    assert f"it says {run.path}" in caplog.messages[-1]
    with pytest.raises(UserError, match=rf"run_dir \({run.path}\) stands in .*moved"):
        chosen(run.path, moved / "config.yaml", is_given=True)


def test_the_folder_that_was_asked_for_is_kept(run, tmp_path, monkeypatch, caplog):
    assert chosen(run.path, run.config) == str(run.path)
    assert chosen("other", run.config) == "other"  # named after the configuration
    assert chosen("other", run.config, is_given=True) == "other"
    monkeypatch.chdir(tmp_path)
    assert chosen("run", run.config) == "run"
    (tmp_path / "link").symlink_to("run")
    assert chosen(run.path, tmp_path / "link" / "config.yaml") == str(run.path)
    (tmp_path / "configs").mkdir()  # a configuration that was copied as a template
    template = tmp_path / "configs" / "config.yaml"
    template.write_text(run.config.read_text())
    assert chosen(run.path, template) == str(run.path)
    assert chosen(run.path, tmp_path / "missing" / "config.yaml") == str(run.path)
    assert not caplog.messages


def test_a_later_configuration_decides(run, tmp_path):
    moved = run.path.rename(tmp_path / "moved")
    mine = tmp_path / "mine.yaml"
    mine.write_text("run_dir: elsewhere\n")
    assert chosen("elsewhere", moved / "config.yaml", mine) == "elsewhere"
    mine.write_text("trainer: {max_steps: 9}\n")
    assert chosen(run.path, moved / "config.yaml", mine) == str(moved)


def damage(path, how):
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "pipe":
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    elif how == "folder":
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.write_bytes(how)


@pytest.mark.parametrize(
    "how",
    [
        b'{"step": \xb4}',
        b"",
        b"[]",
        b'{"step": Infinity}',
        b'{"step": null}',
        b"{" * 10,
        b"[" * 9999,
        "pipe",
        "folder",
    ],
)
def test_an_evaluation_that_cannot_be_read_counts_as_missing(run, how, caplog):
    path = run.evaluation / "metrics.json"
    assert evaluated_step(run) == -1
    assert not caplog.messages
    damage(path, how)
    for _ in range(2):
        assert evaluated_step(run) == -1
    (told,) = caplog.messages
    assert f"{path} cannot be read" in told


@pytest.mark.parametrize(
    "how",
    [b"model: [", b"model: \xff", b"a: 1\na: 2", b"- 1", b"", b"a: &a [*a]", "pipe", "folder"],
)
def test_a_configuration_that_cannot_be_read_is_set_aside(run, how, caplog):
    damage(run.config, how)
    check_same_run(run, SETTINGS)
    set_aside_unreadable(run)
    (told,) = caplog.messages
    assert f"{run.config} cannot be read" in told
    assert not run.config.exists()
    aside = run.path / "config.yaml.unreadable"
    assert aside.read_bytes() == how if isinstance(how, bytes) else aside.exists()


def test_a_sound_configuration_is_compared_and_kept(run):
    set_aside_unreadable(run)
    check_same_run(run, SETTINGS)
    with pytest.raises(UserError, match="holds another run: seed_everything"):
        check_same_run(run, SETTINGS | {"seed_everything": 1})
    run.config.unlink()
    check_same_run(run, SETTINGS | {"seed_everything": 1})
