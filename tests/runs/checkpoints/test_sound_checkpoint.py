"""A run goes on from the newest checkpoint that is whole, and says what is wrong with others."""

import os
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from dist_siglip.cli.run import start_point
from dist_siglip.cli.run.start_point import once_per_node
from dist_siglip.errors import UserError
from dist_siglip.models.weights import read_weights
from dist_siglip.runs import RunFolder, check_sound, newest_sound_checkpoint
from dist_siglip.runs.checkpoints import selection
from dist_siglip.runs.checkpoints.sharded import write_sharded
from dist_siglip.training.callbacks import AtomicCheckpointIO
from tests.support.processes import run_ranks
from tests.support.torchrun import pretend_torchrun

CONTENT = {"state_dict": {"w": torch.zeros(100)}, "optimizer_states": []}


@pytest.fixture
def run(tmp_path):
    """Checkpoints of steps 10 (a file), 20 (a folder), 30 (a file)."""
    folder = RunFolder(tmp_path / "run")
    for step in (10, 30):
        AtomicCheckpointIO().save_checkpoint(CONTENT, folder.checkpoint(step))
    write_sharded(CONTENT, folder.checkpoint(20))
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_the_newest_is_taken_when_it_is_whole(run):
    assert newest_sound_checkpoint(run) == run.checkpoint(30)


def test_a_damaged_one_is_passed_over_and_named(run, monkeypatch):
    said = []
    monkeypatch.setattr(
        "dist_siglip.runs.checkpoints.selection.logger.warning",
        lambda text, *of: said.append(text % of),
    )
    flip(run.checkpoint(30))
    assert newest_sound_checkpoint(run) == run.checkpoint(20)
    (run.checkpoint(20) / ".metadata").unlink()
    assert newest_sound_checkpoint(run) == run.checkpoint(10)
    assert "step=00000030.ckpt is damaged (its bytes have another checksum" in said[0]
    assert "step=00000020.ckpt is damaged (.metadata is missing" in said[2]


def test_a_run_of_damaged_checkpoints_does_not_begin_anew_by_itself(run):
    for step in (10, 30):
        run.checkpoint(step).write_bytes(b"")
    flip(run.checkpoint(20) / "values.pt")
    with pytest.raises(UserError, match="has 3 checkpoints and all are damaged"):
        newest_sound_checkpoint(run)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest_sound_checkpoint(RunFolder(tmp_path)) is None


@pytest.mark.parametrize("step", [10, 20])
def test_a_damaged_one_that_was_named_is_an_error(run, step):
    path = run.checkpoint(step)
    check_sound(path)
    flip(path / "values.pt" if path.is_dir() else path)
    for read in (check_sound, AtomicCheckpointIO().load_checkpoint, read_weights):
        with pytest.raises(UserError, match=r"cannot be read \(.*another checksum") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_file_of_another_program_is_left_to_torch(tmp_path):
    torch.save(CONTENT, tmp_path / "a.ckpt")
    check_sound(tmp_path / "a.ckpt")
    assert "state_dict" in AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


def test_a_run_goes_on_from_a_checkpoint_without_a_checksum_unless_it_was_cut(run, monkeypatch):
    """Written before there were checksums, or by a script of its own."""
    said = []
    monkeypatch.setattr(
        "dist_siglip.runs.checkpoints.selection.logger.warning",
        lambda text, *of: said.append(text % of),
    )
    newest = run.checkpoint(40)
    torch.save(CONTENT, newest)
    assert newest_sound_checkpoint(run) == newest
    assert "has no checksum" in said[-1]
    content = newest.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 10):
        newest.write_bytes(content[:length])
        assert newest_sound_checkpoint(run) != newest


def count_reads(patch):
    """Names of the checkpoints of which every byte is read from now on."""
    reads, plain = [], selection.damage_of
    patch.setattr(selection, "damage_of", lambda path: [reads.append(path.name), plain(path)][1])
    return reads


@pytest.mark.parametrize("step", [20, 30])
def test_a_start_reads_a_checkpoint_once_before_it_loads_it(run, step, monkeypatch):
    for later in range(step + 10, 40, 10):
        run.checkpoint(later).unlink()
    reads = count_reads(monkeypatch)
    found = newest_sound_checkpoint(run)
    AtomicCheckpointIO().load_checkpoint(found)
    assert reads == [run.checkpoint(step).name]


def test_one_that_was_replaced_since_is_read_again(run):
    found = newest_sound_checkpoint(run)
    flip(found)
    os.utime(found, (1, 1))
    with pytest.raises(UserError, match="is damaged"):
        AtomicCheckpointIO().load_checkpoint(found)


def choose_on_ranks(rank, world_size, folder):
    """What a rank goes on from, or why not, and the checkpoints that it has read."""
    pretend_torchrun(rank, world_size)
    with pytest.MonkeyPatch.context() as patch:
        reads = count_reads(patch)
        trainer = Trainer(
            devices=world_size, accelerator="cpu", strategy="ddp", logger=False, barebones=True
        )
        try:
            found = once_per_node(
                trainer, LightningModule(), lambda: newest_sound_checkpoint(RunFolder(folder))
            )
        except UserError as error:
            return str(error), reads
        AtomicCheckpointIO().load_checkpoint(found)
        return found.name, reads


def test_the_first_rank_of_a_node_reads_and_the_others_go_back_with_it(run):
    newest, before = run.checkpoint(30).name, run.checkpoint(20).name
    flip(run.checkpoint(30))
    first, second = run_ranks(choose_on_ranks, 2, run.path)
    assert first == (before, [newest, before])
    assert second == (before, [])


def test_ranks_refuse_together_what_the_first_one_cannot_use(run):
    for step in (10, 30):
        run.checkpoint(step).write_bytes(b"")
    flip(run.checkpoint(20) / "values.pt")
    first, second = run_ranks(choose_on_ranks, 2, run.path)
    assert "all are damaged" in first[0]
    assert second == (first[0], [])


def test_a_process_that_lightning_starts_takes_over_what_its_parent_found(run, monkeypatch):
    trainer = SimpleNamespace(num_devices=2, local_rank=1, strategy=None)
    reads = count_reads(monkeypatch)
    newest = run.checkpoint(30)
    variable = f"{start_point._FOUND}_CHECKPOINT"
    monkeypatch.setenv(variable, f"{os.getppid()} {newest}")

    def choose():
        return newest_sound_checkpoint(run)

    assert once_per_node(trainer, None, choose) == newest
    assert reads == []
    monkeypatch.setenv(variable, f"1{os.getppid()} {newest}")  # of another start
    assert once_per_node(trainer, None, choose) == newest
    assert reads == [newest.name]
