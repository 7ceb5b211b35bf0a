"""Checkpoints are whole under their name and execute nothing when read."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_siglip.errors import UserError
from dist_siglip.runs.checkpoints.io import Snapshot
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


class Queue:
    """Events and streams of CUDA that write down in what order they are told what."""

    def __init__(self, monkeypatch):
        self.told = told = []

        class Stream:
            def __init__(self, device=None):
                self.name = f"copies of {device}"

            def wait_stream(self, other):
                told.append(f"{self.name} wait for {other.name}")

            def wait_event(self, event):
                told.append(f"{self.name} waits for {event.name}")

        class Event:
            def record(self, stream):
                self.name = stream.name
                told.append(f"mark {self.name}")

            def synchronize(self):
                told.append(f"host waits for {self.name}")

        current = Stream()
        current.name = "training"
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda value, stream: told.append(f"keep {stream.name}")
        )

    @contextmanager
    def on(self, stream):
        self.told.append(f"copy on {stream.name}")
        yield


def test_tensors_of_a_device_are_copied_beside_training_and_waited_for_when_it_matters(monkeypatch):
    """One stream for all; behind what was told before; the host waits when it reads alone."""
    queue = Queue(monkeypatch)
    with FakeTensorMode():
        weights = {f"weight {number}": torch.ones(3, device="cuda") for number in range(2)}
        copied = Snapshot({"state_dict": weights, "steps": [3, torch.ones(2)]})
        assert queue.told == [
            "copies of cuda:0 wait for training",
            *["copy on copies of cuda:0", "keep copies of cuda:0"] * 2,
            "mark copies of cuda:0",
        ]
        queue.told.clear()
        copied.hold()
        assert queue.told == ["training waits for copies of cuda:0"]
        queue.told.clear()
        content = copied.read()
        assert queue.told == ["host waits for copies of cuda:0"]
        assert {value.device.type for value in content["state_dict"].values()} == {"cpu"}


def test_a_copy_is_one_of_its_own():
    tensor, numbers = torch.ones(2), [1]
    copied = Snapshot({"a": (tensor, numbers)})
    tensor.zero_()
    numbers.append(2)
    copied.hold()
    found = copied.read()["a"]
    assert found[0].tolist() == [1.0, 1.0]
    assert found[1] == [1]


@pytest.mark.gpu
def test_what_a_device_does_after_hold_is_not_in_the_copy():
    value = torch.ones(1 << 26, device="cuda")
    copied = Snapshot([value])
    copied.hold()
    value.zero_()
    assert copied.read()[0].is_pinned()
    assert bool((copied.read()[0] == 1).all())
