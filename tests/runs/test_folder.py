"""The run folder names its files, finds its newest checkpoint, has one owner, may be damaged."""

import os
from pathlib import Path

import pytest

from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder, collect_provenance, describe_differences, read_best


def test_newest_checkpoint_is_that_of_the_largest_step(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.newest_checkpoint() is None
    folder.checkpoints.mkdir()
    for name in ("step=00000900.ckpt", "step=00001000.ckpt", ".step=00002000.ckpt.7.tmp", "x.ckpt"):
        (folder.checkpoints / name).touch()
    assert folder.steps_with_checkpoint() == [900, 1000]
    assert folder.newest_checkpoint() == folder.checkpoint(1000)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir \(.*file/run\) cannot be written \(Not a dir"):
        RunFolder(tmp_path / "file" / "run").lock()


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    def other_process():
        reading, writing = os.pipe()
        if not (child := os.fork()):
            try:
                RunFolder(tmp_path).lock()
                os.write(writing, b"locked")
            except UserError as error:
                os.write(writing, str(error).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        with open(reading, encoding="utf-8") as said:
            return said.read()

    with RunFolder(tmp_path).lock():
        assert "is in use by another process" in other_process()
        with pytest.raises(UserError, match="is in use"):
            RunFolder(tmp_path).lock()
    assert other_process() == "locked"


BASE = {
    "seed_everything": 0,
    "model": {"model": "ViT-B-32", "optim": {"learning_rate": 1e-3}, "compile_towers": False},
    "data": {"global_batch_size": 8, "workers_per_rank": 0, "train_shards": ["a"]},
    "trainer": {"max_steps": 5},
}


def _changed(*path, value):
    config = {key: dict(v) if isinstance(v, dict) else v for key, v in BASE.items()}
    target = config
    for key in path[:-1]:
        target[key] = dict(target[key])
        target = target[key]
    target[path[-1]] = value
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seed_everything",), 1),
        (("model", "model"), "RN50"),
        (("model", "optim", "learning_rate"), 2e-3),
        (("data", "global_batch_size"), 16),
    ],
)
def test_what_makes_another_run_is_named(path, value):
    (line,) = describe_differences(BASE, _changed(*path, value=value))
    assert line.startswith(".".join(path))
    assert repr(value) in line


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("trainer", "max_steps"), 10),
        (("data", "workers_per_rank"), 3),
        (("data", "train_shards"), ["b"]),
        (("model", "compile_towers"), True),
        (("model", "new_setting"), 1),
    ],
)
def test_speed_length_and_place_may_change(path, value):
    assert describe_differences(BASE, _changed(*path, value=value)) == []


def test_tuples_of_the_command_line_equal_lists_of_yaml():
    assert describe_differences({"data": {"x": [1, 2]}}, {"data": {"x": (1, 2)}}) == []


def test_provenance_names_command_versions_and_commit():
    provenance = collect_provenance(["dist-siglip", "fit", "--run_dir", "a b"], world_size=2)
    assert provenance["command"] == "dist-siglip fit --run_dir 'a b'"
    assert provenance["versions"]["torch"].startswith("2.")
    in_checkout = (Path(__file__).parents[2] / ".git").exists()
    assert (provenance["commit"] is not None) == in_checkout


def test_the_lock_is_no_way_to_another_file(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to("../precious")
    with pytest.raises(UserError, match=r"\.lock is a symbolic link; remove it"):
        RunFolder(tmp_path / "run").lock()
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "evaluation"])
def test_a_file_in_place_of_a_folder_is_named_before_anything_runs(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name} must be a folder"):
        RunFolder(tmp_path).lock()
    (tmp_path / name).unlink()
    RunFolder(tmp_path).lock().release()


def test_a_folder_that_was_moved_while_it_is_held_is_named(tmp_path):
    run = RunFolder(tmp_path / "old")
    assert not run.is_moved()
    with run.lock():
        assert not run.is_moved()
        run.checkpoints.mkdir()
        run.checkpoint(7).touch()
        run.path.rename(tmp_path / "new")
        assert run.is_moved()
        told = str(run.moved())
    assert f"run_dir ({run.path}) was moved away" in told
    assert f"--run_dir={tmp_path / 'new'} to go on from step=00000007.ckpt" in told
    assert not run.is_moved()


@pytest.mark.parametrize(
    "value", ["0.5", "null", '"x"', "[]", "NaN", "Infinity", "9" * 400, "[" * 5000, "\xff"]
)
def test_a_note_on_the_best_checkpoint_that_cannot_be_used_is_beaten_by_anything(tmp_path, value):
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    run.checkpoint(4).touch()
    text = f'{{"step": 4, "metric": "val/loss", "value": {value}}}'
    run.best.write_bytes(text.encode("latin-1"))
    best = read_best(run, "val/loss", "min")
    assert best.is_beaten_by(0.7, "min") == (value != "0.5")
