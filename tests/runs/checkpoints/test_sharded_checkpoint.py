import os
import pickle
import pickletools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_siglip.errors import UserError
from dist_siglip.runs.checkpoints.sharded import (
    is_sharded,
    read_into,
    read_values,
    read_whole,
    stored_shapes,
    write_sharded,
)
from tests.support.processes import run_ranks


def checkpoint_of(sharded=lambda value: value):
    """A small checkpoint as a run writes it."""
    weight, bias = torch.arange(15.0).reshape(5, 3), torch.tensor([0.5])
    moments = {"exp_avg": sharded(weight + 100), "step": torch.tensor(7.0)}
    state = {"state": {"a.weight": moments}, "param_groups": [{"lr": 0.1, "params": ["a.weight"]}]}
    return {
        "state_dict": {"a.weight": sharded(weight), "bias": sharded(bias)},
        "optimizer_states": [state],
        "global_step": 7,
        "callbacks": {"x": [1, 2.5, "three", None]},
    }


def assert_equal(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_what_one_process_writes_it_reads_again(tmp_path):
    path = tmp_path / "step=1.ckpt"
    write_sharded(checkpoint_of(), path)
    assert is_sharded(path)
    assert_equal(read_whole(path), checkpoint_of())
    assert stored_shapes(path) == {"a.weight": (5, 3), "bias": (1,)}
    assert read_values(path)["global_step"] == 7
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_shards_of_three_ranks_are_read_by_one_and_by_two(tmp_path):
    path = str(tmp_path / "step=1.ckpt")
    run_ranks(_write, 3, path)
    assert_equal(read_whole(tmp_path / "step=1.ckpt"), checkpoint_of())
    for found in run_ranks(_read, 2, path):
        assert_equal(found, checkpoint_of()["state_dict"])


def _write(rank, world_size, path):
    mesh = init_device_mesh("cpu", (world_size,))
    write_sharded(checkpoint_of(lambda v: distribute_tensor(v, mesh, [Shard(0)])), Path(path))


def _read(rank, world_size, path):
    mesh = init_device_mesh("cpu", (world_size,))
    empty = {
        name: distribute_tensor(torch.zeros_like(value), mesh, [Shard(0)])
        for name, value in checkpoint_of()["state_dict"].items()
    }
    read_into(Path(path), empty)
    return {name: value.full_tensor() for name, value in empty.items()}


def test_a_folder_of_that_name_is_replaced_whole(tmp_path):
    path = tmp_path / "a.ckpt"
    write_sharded(checkpoint_of(), path)
    changed = {**checkpoint_of(), "global_step": 8}
    write_sharded(changed, path)
    assert_equal(read_whole(path), changed)


@pytest.mark.parametrize("call", ["torch.save", "os.fsync", "rename"])
def test_a_failure_while_writing_leaves_the_old_one(tmp_path, monkeypatch, call):
    path = tmp_path / "a.ckpt"
    write_sharded(checkpoint_of(), path)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if call == "torch.save":
            patched.setattr(torch, "save", fail)
        elif call == "os.fsync":
            patched.setattr(os, "fsync", fail)
        else:
            own = Path.rename

            def fail_at_last(self, target):
                return fail() if self.suffix == ".tmp" else own(self, target)

            patched.setattr(Path, "rename", fail_at_last)
        with pytest.raises(OSError, match="No space left"):
            write_sharded({**checkpoint_of(), "global_step": 8}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert_equal(read_whole(path), checkpoint_of())


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_the_index_is_refused_and_does_not_run(tmp_path):
    path = tmp_path / "a.ckpt"
    write_sharded(checkpoint_of(), path)
    (path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"a.ckpt\) cannot be read .*names (posix|os).mkdir"):
        read_whole(path)
    assert not (tmp_path / "ran").exists()


def test_code_in_the_values_is_refused_and_does_not_run(tmp_path):
    path = tmp_path / "a.ckpt"
    write_sharded(checkpoint_of(), path)
    torch.save({"x": Evil(tmp_path / "ran")}, path / "values.pt")
    with pytest.raises(UserError, match=r"a.ckpt\) cannot be read"):
        read_values(path)
    assert not (tmp_path / "ran").exists()


def test_an_index_that_points_outside_of_the_folder_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    write_sharded(checkpoint_of(), path)
    index = (path / ".metadata").read_bytes()
    name = next(p.name for p in path.iterdir() if p.suffix == ".distcp")
    other = "../" + name[3:]
    assert len(other) == len(name)
    assert any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(index))
    (path / ".metadata").write_bytes(index.replace(name.encode(), other.encode()))
    with pytest.raises(UserError, match="outside of the folder"):
        read_whole(path)


@pytest.mark.parametrize("name", [".metadata", "values.pt", "data"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_a_damaged_folder_is_one_line(tmp_path, name, damage):
    path = tmp_path / "a.ckpt"
    write_sharded(checkpoint_of(), path)
    file = (
        path / name if name != "data" else next(p for p in path.iterdir() if p.suffix == ".distcp")
    )
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_whole(path)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "a.ckpt"
    write_sharded(checkpoint_of(), path)
    with pytest.raises(UserError, match="other"):
        read_into(path, {"other": torch.zeros(2)})
    assert not dist.is_initialized()
