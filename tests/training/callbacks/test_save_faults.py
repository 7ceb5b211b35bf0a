"""ENOSPC, EIO, SIGKILL and loss of power at every call of a save leave a whole checkpoint."""

import os
from types import SimpleNamespace

import pytest
import torch

from dist_siglip.runs import RunFolder, newest_sound_checkpoint
from dist_siglip.runs.checkpoints.callback import _remove_unfinished
from dist_siglip.runs.checkpoints.io import read_checkpoint
from dist_siglip.runs.checkpoints.selection import damage_of, save_sealed
from dist_siglip.runs.checkpoints.sharded import write_sharded
from dist_siglip.system.atomic import open_atomically, sync_folder
from dist_siglip.training.callbacks import AtomicCheckpointIO, RunCheckpoint
from tests.support.faults import KINDS, Disk, in_fork

pytestmark = pytest.mark.faults

WRITERS = {"file": AtomicCheckpointIO().save_checkpoint, "folder": write_sharded}


def content_of(step):
    weights = {"w": torch.full((300,), float(step))}
    return {"state_dict": weights, "optimizer_states": [], "global_step": step}


def save(callback, folder, step, write):
    """What the callback does after a step, without a Trainer."""
    strategy = SimpleNamespace(
        save_checkpoint=write,
        remove_checkpoint=AtomicCheckpointIO().remove_checkpoint,
        broadcast=lambda value: value,
    )
    trainer = SimpleNamespace(
        fast_dev_run=False,
        global_step=step,
        strategy=strategy,
        is_global_zero=True,
        default_root_dir=str(folder.path),
        _checkpoint_connector=SimpleNamespace(
            dump_checkpoint=lambda weights_only: content_of(step)
        ),
    )
    callback.on_train_batch_end(trainer, None, None, None, 0)


def started(tmp_path, write):
    """A run with the checkpoint of step 10."""
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    callback = RunCheckpoint(every_steps=10, keep=1, allowed_misses=5)
    save(callback, folder, 10, write)
    return folder, callback


def count_calls(tmp_path, write):
    """Calls of the save of step 20, which removes step 10; the last is its end."""
    folder, callback = started(tmp_path / "counted", write)
    with Disk(folder.path).failing() as disk:
        save(callback, folder, 20, write)
        disk.step("end")
    assert folder.steps_with_checkpoint() == [20]
    return disk.calls


def check_sound(folder):
    """The newest sound checkpoint is exactly one of the two that were begun."""
    found = newest_sound_checkpoint(folder)
    assert found is not None
    loaded = read_checkpoint(found)
    step = loaded["global_step"]
    assert found == folder.checkpoint(step)
    assert step in (10, 20)
    assert torch.equal(loaded["state_dict"]["w"], content_of(step)["state_dict"]["w"])
    return step


def places(calls, every_write):
    """Numbers of the calls to fail at; between two writes to a file, nothing new can happen."""
    for number, name in enumerate(calls, 1):
        around = {name, *calls[number - 2 : number + 1]}
        if every_write or around != {"write"}:
            yield number


def after_faults(kind, write, tmp_path, every_write=True):
    """Yield the run and its callback after a fault at each call of the save of step 20."""
    calls = count_calls(tmp_path, write)
    for number in places(calls, every_write):
        folder, callback = started(tmp_path / str(number), write)
        disk = Disk(folder.path, number, kind)

        def save_on_it(disk=disk, callback=callback, folder=folder):
            with disk.failing():
                save(callback, folder, 20, write)
                if kind in ("kill", "power"):
                    disk.step("end")

        if kind in ("kill", "power"):
            assert in_fork(save_on_it) == -9
        else:
            save_on_it()
        yield folder, callback


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_call_of_a_save_leaves_a_whole_checkpoint(kind, form, tmp_path):
    write, found = WRITERS[form], []
    for folder, callback in after_faults(
        kind, write, tmp_path, every_write=(kind, form) == ("kill", "file")
    ):
        found.append(check_sound(folder))
        # The next save is as if nothing had happened.
        _remove_unfinished(folder)
        save(callback, folder, 30, write)
        assert folder.steps_with_checkpoint()[-1] == 30
        assert not folder.unfinished()
    assert set(found) == {10, 20}
    # A process that was ended later has never done less.
    assert kind in ("ENOSPC", "EIO") or found == sorted(found)


def write_in_place(checkpoint, path):
    """Writes to the final name."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        save_sealed(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def write_without_sync(checkpoint, path):
    """Renames data that the disk may not have."""
    with open_atomically(path, sync=False) as file:
        save_sealed(checkpoint, file)
    sync_folder(path.parent)


def write_without_sync_of_the_folder(checkpoint, path):
    """Goes on before the disk has the name."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        save_sealed(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@pytest.mark.parametrize(
    ("write", "kind", "is_noticed_by"),
    [
        (write_in_place, "kill", "torn"),
        (write_without_sync, "power", "torn"),
        (write_without_sync_of_the_folder, "power", "lost"),
    ],
)
def test_a_writer_that_leaves_a_step_out_is_noticed(write, kind, is_noticed_by, tmp_path):
    """The faults find each of them: a damaged file has its name, or there is no checkpoint."""
    seen = set()
    for folder, _ in after_faults(kind, write, tmp_path, every_write=False):
        damages = [damage_of(folder.checkpoint(step)) for step in folder.steps_with_checkpoint()]
        seen |= {"lost"} if not damages else {"torn"} if any(damages) else {"whole"}
    assert is_noticed_by in seen
