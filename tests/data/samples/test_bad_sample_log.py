import json
import multiprocessing

from dist_siglip.data.samples.bad_samples import BadSampleLog, first_lines
from tests.support.processes import IMPORTED_ONCE


def write_many(path, process):
    log = BadSampleLog(path)
    for number in range(300):
        log.append(shard="s.tar", key=f"{process}-{number}\n", reason="x" * 500)


def test_lines_of_many_processes_do_not_mix(tmp_path):
    path = str(tmp_path / "bad.jsonl")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    processes = [context.Process(target=write_many, args=(path, i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    with open(path) as file:
        keys = [json.loads(line)["key"] for line in file]
    assert sorted(keys) == sorted(f"{p}-{n}\n" for p in range(3) for n in range(300))


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path, caplog):
    path = tmp_path / "bad.jsonl"
    path.symlink_to("/dev/full")
    log = BadSampleLog(str(path))
    for _ in range(3):
        log.append(shard="s", key="k", reason="r")
    assert caplog.text.count("bad samples cannot be written") == 1
    path.unlink()
    log.append(shard="s", key="k", reason="r")
    assert first_lines(str(path), 9) == ["s/k: r"] * 4
    BadSampleLog(str(tmp_path / "no folder" / "x")).append(key="k")
    assert "no folder" in caplog.text


def test_the_first_are_named_and_a_cut_line_is_passed_over(tmp_path):
    path = tmp_path / "bad.jsonl"
    log = BadSampleLog(str(path))
    for number in range(5):
        log.append(shard="s.tar", key=f"k{number}", reason="why")
    assert first_lines(str(path), 2) == ["s.tar/k0: why", "s.tar/k1: why"]
    start = path.stat().st_size
    log.append(shard="s.tar", key="new", reason="w" * 5000)
    assert first_lines(str(path), 9, start) == ["s.tar/new: " + "w" * 200]
    path.write_text('{"shard": "a", "key": "b", "reason": "c"}\n{"torn')
    log.append(shard="d", key="e", reason="f")
    assert first_lines(str(path), 9) == ["a/b: c", "d/e: f"]
    assert first_lines(str(tmp_path / "none"), 3) == []
    assert first_lines(None, 3) == []
