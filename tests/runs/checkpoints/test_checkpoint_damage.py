"""Every byte of a checkpoint counts: a cut, a block of zeros and a flipped bit are found."""

import pytest
import torch

from dist_siglip.runs.checkpoints.selection import damage_of, has_checksum, save_sealed
from dist_siglip.runs.checkpoints.sharded import write_sharded

CONTENT = {"state_dict": {"w": torch.arange(3.0), "v": torch.ones(5)}, "step": 7}


def write_file(path):
    with path.open("wb") as file:
        save_sealed(CONTENT, file)
    return path


def write_folder(path):
    write_sharded({**CONTENT, "optimizer_states": []}, path)
    return path


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_what_was_just_written_is_sound(write, tmp_path):
    assert damage_of(write(tmp_path / "a.ckpt")) is None


def test_torch_reads_a_file_that_ends_in_its_checksum(tmp_path):
    path = write_file(tmp_path / "a.ckpt")
    assert has_checksum(path)
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert torch.equal(loaded["state_dict"]["w"], CONTENT["state_dict"]["w"])


def test_every_flipped_bit_of_a_file_is_found(tmp_path):
    path = write_file(tmp_path / "a.ckpt")
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert damage_of(path) is not None, place


def test_a_file_cut_anywhere_or_with_bytes_after_it_is_found(tmp_path):
    path = write_file(tmp_path / "a.ckpt")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert "cut short" in damage_of(path)
    path.write_bytes(content + b"\0")
    assert "cut short" in damage_of(path)


def test_torch_alone_would_load_a_flipped_bit(tmp_path):
    """The comparison with the checksum is needed: a weight changes and nothing is raised."""
    path = write_file(tmp_path / "a.ckpt")
    content = bytearray(path.read_bytes())
    place = bytes(content).index(torch.ones(5).numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    loaded = torch.load(path, weights_only=True)
    assert not torch.equal(loaded["state_dict"]["v"], torch.ones(5))
    assert "another checksum" in damage_of(path)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_to_any_file_of_a_folder_is_found_and_the_file_named(damage, tmp_path):
    path = write_folder(tmp_path / "a.ckpt")
    names = sorted(file.name for file in path.iterdir())
    assert len(names) == 4  # index, shard, values, list of checksums
    for name in names:
        file = path / name
        content = file.read_bytes()
        if damage == "gone":
            file.unlink()
        else:
            flipped = bytes([content[0] ^ 1, *content[1:]])
            file.write_bytes(flipped if damage == "flip" else content[:-2])
        assert name in damage_of(path)
        file.write_bytes(content)
        assert damage_of(path) is None


@pytest.mark.parametrize("number", range(1, 40, 3))
def test_a_write_that_fails_is_an_error_of_the_disk_whatever_torch_makes_of_it(number, tmp_path):
    """torch's archive writer raises RuntimeError about its position when a write has failed."""

    class Full:
        written = 0

        def write(self, data):
            self.written += 1
            if self.written == number:
                raise OSError(28, "No space left on device")
            return len(data)

        def flush(self):
            pass

    with pytest.raises(OSError, match="No space left on device"):
        save_sealed(CONTENT, Full())
