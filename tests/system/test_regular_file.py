"""Only files are opened: nothing waits for a pipe, at any place that reads."""

import os
import socket

import pytest

from dist_siglip.system.regular_file import (
    check_regular,
    descriptor_of,
    open_regular,
    open_text,
    open_to_append,
    read_json,
    read_regular,
)

READERS = (check_regular, descriptor_of, open_regular, open_text, read_json, read_regular)


@pytest.fixture
def odd(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket"))
        yield tmp_path


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_refused_at_once(odd, read):
    for name in ("pipe", "folder", "link", "socket", "/dev/zero", "missing"):
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError) as told:  # noqa: PT011 - each has a number of its own
            read(odd / name)
        assert told.value.strerror
        assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_is_read_also_through_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b'{"a": 1}\r\n')
    (tmp_path / "link").symlink_to("file")
    for path in (tmp_path / "file", str(tmp_path / "link")):
        assert read_regular(path) == b'{"a": 1}\r\n'
        assert read_json(path) == {"a": 1}
        with open_regular(path) as file, open_text(path, newline="") as text:
            assert str(file.name) == str(path)
            assert text.read() == file.read().decode()
    with pytest.raises(OSError, match="is larger than 9 bytes"):
        read_regular(tmp_path / "file", 9)
    assert read_regular(tmp_path / "file", 10)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_json_that_cannot_be_read_is_one_kind_of_error(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011 - of json, of the text or of ours
        read_json(tmp_path / "file")


def test_lines_are_not_appended_to_a_pipe(odd):
    for name in ("pipe", "folder", "socket"):
        with pytest.raises(OSError):  # noqa: PT011 - each has a number of its own
            open_to_append(odd / name)
    for _ in range(2):
        with open_to_append(odd / "new") as file:
            file.write(b"x")
    assert (odd / "new").read_bytes() == b"xx"
    with open_to_append("/dev/null") as file:
        file.write(b"x")
