"""A log outlives a full disk: told once, lines wait, and the file holds whole lines only."""

import errno
import logging
import multiprocessing
import os

import pytest

from dist_siglip.system import best_effort as best_effort_module
from dist_siglip.system.best_effort import LineLog, append_whole, best_effort
from tests.support.processes import LIMIT_SECONDS
from tests.support.small_disk import make_room, on_small_disk


def test_a_line_that_the_disk_cuts_is_taken_back(tmp_path):
    path = tmp_path / "lines"
    append_whole(path, b"first\n")

    def write():
        with pytest.raises(OSError, match="File too large"):
            append_whole(path, b"second\n")

    on_small_disk(9, write)
    assert path.read_bytes() == b"first\n"


def test_a_line_of_another_process_is_not_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    look_at = os.fstat

    def another_appends_first(descriptor):
        make_room()
        with path.open("ab") as file:
            file.write(b"theirs\n")
        return look_at(descriptor)

    def write():
        monkeypatch.setattr("dist_siglip.system.best_effort.os.fstat", another_appends_first)
        with pytest.raises(OSError, match="File too large"):
            append_whole(path, b"mine is long\n")

    on_small_disk(4, write)
    append_whole(path, b"next\n")
    assert path.read_bytes() == b"minetheirs\nnext\n"


def test_what_a_crash_has_cut_does_not_spoil_the_next_line(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n{"a"')
    append_whole(path, b'{"a": 2}\n')
    assert path.read_bytes() == b'{"a": 1}\n{"a"\n{"a": 2}\n'


def test_lines_wait_for_room_and_arrive_in_order(tmp_path, caplog):
    path = tmp_path / "lines"
    path.symlink_to("/dev/full")
    log = LineLog(path, "metrics")
    for number in range(3):
        log.append(str(number))
    assert log.num_waiting == 3
    path.unlink()
    log.append("3")
    assert path.read_text() == "0\n1\n2\n3\n"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "metrics cannot be written" in caplog.messages[0]
    assert "No space left on device" in caplog.messages[0]
    assert caplog.messages[1] == "metrics can be written again: 4 lines waited for it"


def test_only_so_many_lines_wait_and_the_oldest_are_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(best_effort_module, "_MOST_WAITING", 2)
    path = tmp_path / "lines"
    path.symlink_to("/dev/full")
    log = LineLog(path, "metrics")
    for number in range(5):
        log.append(str(number))
    assert log.num_waiting == 2
    path.unlink()
    log.flush()
    assert path.read_text() == "3\n4\n"


def test_a_second_full_disk_is_told_again(tmp_path, caplog):
    path = tmp_path / "lines"
    log = LineLog(path, "metrics")
    for _ in range(2):
        path.symlink_to("/dev/full")
        log.append("x")
        path.unlink()
        log.append("y")
        path.unlink()
    assert len(caplog.messages) == 4


def test_a_missing_folder_is_like_a_full_disk(tmp_path, caplog):
    log = LineLog(tmp_path / "gone" / "lines", "metrics")
    log.append("x")
    (tmp_path / "gone").mkdir()
    log.append("y")
    assert (tmp_path / "gone" / "lines").read_text() == "x\ny\n"


def test_a_forked_process_does_not_write_what_waits_in_its_parent(tmp_path):
    path = tmp_path / "lines"
    path.symlink_to("/dev/full")
    log = LineLog(path, "metrics")
    log.append("of the parent")
    path.unlink()
    child = multiprocessing.get_context("fork").Process(target=log.append, args=("of the child",))
    child.start()
    child.join(LIMIT_SECONDS)
    log.append("again of the parent")
    assert path.read_text() == "of the child\nof the parent\nagain of the parent\n"


def append_many(path, process):
    for number in range(200):
        append_whole(path, f"{process}-{number}-{'x' * 300}\n".encode())


def test_lines_of_many_processes_are_whole(tmp_path):
    path = tmp_path / "lines"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_many, args=(path, i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_SECONDS)
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(f"{p}-{n}-{'x' * 300}" for p in range(3) for n in range(200))


def test_what_can_be_missing_is_a_warning_and_a_defect_is_not(caplog):
    with caplog.at_level(logging.WARNING), best_effort("the report"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    assert caplog.messages == [
        "the report cannot be written (Disk quota exceeded); the run goes on without"
    ]
    with pytest.raises(ZeroDivisionError), best_effort("the report"):
        raise ZeroDivisionError
