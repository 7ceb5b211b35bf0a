"""``doctor --gpu``: every part runs on a CPU with tiny sizes, and none ends the others."""

import json
import sys
import warnings

import pytest
import torch

from dist_siglip.cli import main
from dist_siglip.doctor import gpu, gpu_loss, gpu_training
from dist_siglip.doctor.gpu import LIMITS, PARTS, run_in_process, run_part, run_parts
from dist_siglip.doctor.gpu_sizes import LARGE, SMALL, TINY, PartError

CPU = torch.device("cpu")
MACHINE = {"device": "abacus", "memory_gib": 0.1}
IN_PROCESS = ("loss", "profile", "hops", "companions", "retrieval")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",
    "ignore:pkg_resources:UserWarning",
)


@pytest.mark.parametrize(
    "name",
    # The loss is compiled, which takes 25 s of processor time where no cache has it.
    [pytest.param(name, marks=[pytest.mark.e2e] * (name == "loss")) for name in IN_PROCESS],
)
def test_a_part_runs_on_any_device(name):
    found = run_part(name, CPU, TINY)
    assert "error" not in found, found
    assert found["summary"]
    json.dumps(found)


@pytest.mark.e2e
def test_training_without_a_wait_runs_on_a_cpu():
    found = run_part("strict fit", CPU, TINY)
    assert found["steps"] == TINY.fit_steps - 4, found
    assert found["waits"] == []


@pytest.mark.e2e
def test_training_is_timed_on_a_cpu():
    found = run_part("training", CPU, TINY)
    (row,) = found["training"]
    assert row["compiled"] is False
    assert 0 < row["mfu"] < 1


@pytest.mark.e2e
def test_two_ranks_of_one_device_agree_with_one_process():
    found = run_part("ranks", CPU, TINY)
    assert found["ranks"] == 2, found
    assert {row["exchange"] for row in found["rows"]} == {"ring", "all_gather"}


@pytest.mark.e2e
def test_tests_are_counted_and_those_that_fail_are_named(tmp_path):
    (tmp_path / "test_a.py").write_text("def test_one(): pass\ndef test_two(): assert 1 == 2\n")
    chosen = TINY._replace(tests=(str(tmp_path / "test_a.py"),))
    found = run_part("tests", CPU, chosen)
    assert found["error"] == "1 of 2 tests failed"
    assert "test_two" in found["failed_tests"][0]["test"]


def test_transfers_that_arrive_changed_are_an_error(monkeypatch):
    monkeypatch.setattr(gpu_loss, "_overwrite_under_load", lambda *_: 3)
    found = run_part("companions", CPU, TINY)
    assert found == {"wrong": 3, "error": "3 of 5 transfers arrived changed"}


def test_ranks_that_differ_from_float64_are_an_error(monkeypatch):
    def one_too_many(*arguments):
        return tuple(ranks + 1 for ranks in original(*arguments))

    original = gpu_training.retrieval_ranks_both_ways
    monkeypatch.setattr(gpu_training, "retrieval_ranks_both_ways", one_too_many)
    assert "ranks differ from float64" in run_part("retrieval", CPU, TINY)["error"]


class FakeTrainer:
    max_steps = 12

    class strategy:  # noqa: N801 - as the Trainer names it
        root_device = CPU


def test_a_wait_is_counted_in_its_step_and_named(tmp_path):
    strict = gpu_training.StrictSteps(str(tmp_path / "strict.json"))
    with warnings.catch_warnings():
        for step in range(12):
            strict.on_train_batch_start(FakeTrainer, None, None, step)
            if step in (1, 5, 9):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            strict.on_train_batch_end(FakeTrainer, None, None, None, step)
    found = json.loads((tmp_path / "strict.json").read_text())
    assert {step for step, number in found["waits"].items() if number} == {"5", "9"}
    assert sum(found["places"].values()) == 2
    assert "test_gpu.py" in next(iter(found["places"]))


def test_what_fails_or_hangs_is_recorded_and_the_others_run(tmp_path, capsys):
    def run(name, device, sizes, limit, folder):
        return {
            "a": {"summary": "fine", "rows": [{"x": 1.5, "y": {"z": 2}}], "count": 3},
            "b": {"error": "<broken>", "details": "a traceback"},
            "c": None,
            "d": {"skipped": "nothing at hand"},
        }[name]

    limits = dict.fromkeys("abcd", 7.0)
    assert run_parts(tmp_path / "out", CPU, TINY, limits, MACHINE, run) == 1
    record = json.loads((tmp_path / "out/gpu.json").read_text())
    states = [part["status"] for part in record["parts"]]
    assert states == ["ok", "failed", "out of time", "skipped"]
    assert record["machine"] == MACHINE
    assert record["parts"][0]["found"] == {"rows": [{"x": 1.5, "y": {"z": 2}}], "count": 3}
    page = (tmp_path / "out/gpu.html").read_text()
    assert "&lt;broken&gt;" in page
    assert "z 2" in page
    said = capsys.readouterr().out
    assert "2 failed, 0 warnings, 1 ok" in said
    assert run_parts(tmp_path, CPU, TINY, {"a": 7.0}, MACHINE, run) == 0


def test_parts_fit_into_ten_minutes_and_into_five_on_a_smaller_gpu():
    assert LIMITS.keys() == PARTS.keys()
    assert sum(LIMITS.values()) <= 600
    assert LARGE.loss_shapes[-1] == (32768, 1152)
    assert max(rows for rows, _ in SMALL.loss_shapes) <= 8192


@pytest.mark.e2e
def test_a_process_that_crashes_or_hangs_is_told(tmp_path, monkeypatch):
    found = run_in_process("retrieval", CPU, TINY, 300, tmp_path)
    assert found["wrong_ranks"] == 0
    for line, expected in (
        ("import time; time.sleep(60)", None),
        ("import sys; sys.exit('no such device')", {"error": "ended with code 1: no such device"}),
    ):
        program = tmp_path / "program"
        program.write_text(f"#!{sys.executable}\n{line}\n")
        program.chmod(0o700)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(program))
            assert run_in_process("hops", CPU, TINY, 2, tmp_path) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line_and_code_2(tmp_path, capsys):
    assert main(["doctor", "--gpu", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "needs a CUDA device, and torch" in said.err
    assert not (tmp_path / "out").exists()


def test_an_error_keeps_what_was_measured(monkeypatch):
    def fails(device, sizes):
        raise PartError("no", {"seconds": 1.0})

    monkeypatch.setitem(gpu.PARTS, "hops", fails)
    assert run_part("hops", CPU, TINY) == {"seconds": 1.0, "error": "no"}
    monkeypatch.setitem(gpu.PARTS, "hops", lambda device, sizes: 1 // 0)
    assert run_part("hops", CPU, TINY)["error"].startswith("ZeroDivisionError")
