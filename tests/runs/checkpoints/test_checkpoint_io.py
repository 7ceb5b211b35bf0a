"""Checkpoints are whole under their name and execute nothing when read."""

import os
from pathlib import Path

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.training.callbacks import AtomicCheckpointIO


def test_what_was_saved_comes_back(tmp_path):
    path = tmp_path / "a" / "step=00000001.ckpt"
    writer = AtomicCheckpointIO()
    content = {"state_dict": {"w": torch.arange(3.0)}, "samples_consumed": 8}
    writer.save_checkpoint(content, path)
    loaded = writer.load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(3.0))
    assert loaded["samples_consumed"] == 8
    writer.remove_checkpoint(path)
    assert not path.exists()


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "step=00000001.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"state_dict": {"w": torch.zeros(1)}}, path)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"state_dict": {"w": torch.ones(1)}}, path)
    monkeypatch.undo()
    assert writer.load_checkpoint(path)["state_dict"]["w"].item() == 0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


class _Payload:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    path, marker = tmp_path / "a.ckpt", tmp_path / "executed"
    torch.save({"state_dict": {}, "x": _Payload(marker)}, path)
    with pytest.raises(UserError, match="more than tensors and plain values"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not marker.exists()
    with pytest.raises(UserError, match=r"weights_only \(False\)"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_damaged_file_is_one_clear_line(tmp_path, keep):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(100)}}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="cannot be read") as caught:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.ckpt\) does not exist"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
    torch.save({"weights": 1}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="holds no state_dict"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "foreign.ckpt")
