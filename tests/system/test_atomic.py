"""A file is whole under its name or not there."""

import pytest

from dist_siglip.system.atomic import open_atomically, write_atomically


def test_text_and_bytes_arrive_whole(tmp_path):
    write_atomically(tmp_path / "new" / "a.txt", "größe\n")
    write_atomically(tmp_path / "new" / "b.bin", b"\x00\x01")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "größe\n"
    assert (tmp_path / "new" / "b.bin").read_bytes() == b"\x00\x01"


def test_an_error_while_writing_keeps_the_previous_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def write_half():
        with open_atomically(path) as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_visible_before_the_end(tmp_path):
    path = tmp_path / "a.txt"
    with open_atomically(path) as file:
        file.write(b"x")
        file.flush()
        assert not path.exists()
    assert path.exists()
