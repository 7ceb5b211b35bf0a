import json
import multiprocessing

from dist_siglip.data.bad_sample_log import BadSampleLog, first_lines


def write_many(path, process):
    log = BadSampleLog(path)
    for number in range(300):
        log.append(shard="s.tar", key=f"{process}-{number}\n", reason="x" * 500)


def test_lines_of_many_processes_do_not_mix(tmp_path):
    path = str(tmp_path / "bad.jsonl")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(path, i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    with open(path) as file:
        keys = [json.loads(line)["key"] for line in file]
    assert sorted(keys) == sorted(f"{p}-{n}\n" for p in range(3) for n in range(300))


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path, caplog):
    log = BadSampleLog("/dev/full")
    for _ in range(3):
        log.append(key="k")
    assert caplog.text.count("cannot be written to /dev/full") == 1
    BadSampleLog(str(tmp_path / "no folder" / "x")).append(key="k")
    assert "no folder" in caplog.text


def test_the_first_are_named_and_damage_ends_the_list(tmp_path):
    path = tmp_path / "bad.jsonl"
    log = BadSampleLog(str(path))
    for number in range(5):
        log.append(shard="s.tar", key=f"k{number}", reason="why")
    assert first_lines(str(path), 2) == ["s.tar/k0: why", "s.tar/k1: why"]
    start = path.stat().st_size
    log.append(shard="s.tar", key="new", reason="w" * 5000)
    assert first_lines(str(path), 9, start) == ["s.tar/new: " + "w" * 200]
    path.write_text('{"shard": "a", "key": "b", "reason": "c"}\n{"torn')
    assert first_lines(str(path), 9) == ["a/b: c"]
    assert first_lines(str(tmp_path / "none"), 3) == []
    assert first_lines(None, 3) == []
