"""The doctor finds what ails machines and ranks, names it, and never waits without end."""

import re
import subprocess
import sys
import threading
import time

import pytest
import yaml

from dist_siglip import cli
from tests.support.command import REPOSITORY, environment, write_settings
from tests.support.doctor_ranks import start_doctors
from tests.support.processes import LIMIT_SECONDS
from tests.support.shards import write_shards

pytestmark = pytest.mark.e2e

_QUICK = ("--write_mib=1", "--local_batch_size=64", "--embed_dim=16")
_PATIENCE_SECONDS = 4


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), (3, 2))


def lines_of(page, status):
    return [line for line in page.splitlines() if line.startswith(status)]


def doctor_of_all(run):
    """Wait for all ranks, many times as long as any may take; return exit codes and the page."""
    return run.wait(), run.said()


def alone(capsys, monkeypatch, *arguments):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    code = cli.main(["doctor", *map(str, (*_QUICK, *arguments))])
    return code, capsys.readouterr().out


def test_a_sound_machine_is_told_so_on_one_page(folder, shards, capsys, monkeypatch):
    code, page = alone(capsys, monkeypatch, "--run_dir", folder / "run", "--shards", shards[0])
    assert code == 0
    assert lines_of(page, "FAIL") == []
    for check in ("versions", "devices", "run folder", "shards"):
        assert re.search(rf"^(ok|warn) +{check}", page, flags=re.MULTILINE), page
    assert len(page.splitlines()) < 60
    assert list(folder.iterdir()) == []


def test_libraries_that_cannot_be_imported_are_told(folder):
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')"
    )
    done = subprocess.run(
        [sys.executable, "-m", "dist_siglip", "doctor"],
        env={**environment(), "PYTHONPATH": f"{folder}:{REPOSITORY}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout.startswith(
        "FAIL  imports       ImportError: libcudart.so.13: cannot open shared object file\n"
    )


def test_a_configuration_says_what_to_look_at(folder, capsys, monkeypatch):
    settings = write_settings(folder)
    code, page = alone(capsys, monkeypatch, "--config", settings)
    assert code == 0, page
    assert "global batch of 12, 12 for each of 1 ranks" in page
    assert re.search(r"^\w+ +train_shards +3 named; 3 of 3 opened had no", page, re.MULTILINE)
    assert re.search(r"^\w+ +val_shards", page, re.MULTILINE)
    assert not (folder / "run").exists()


def test_a_configuration_that_fit_refuses_fails(folder, capsys, monkeypatch):
    settings = write_settings(folder, devices=5)
    code, page = alone(capsys, monkeypatch, "--config", settings)
    assert code == 1
    assert "global_batch_size (12) is not divisible by 5 ranks" in page
    settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | {"modle": {"a": 1}}))
    code, page = alone(capsys, monkeypatch, "--config", settings)
    assert code == 1
    assert re.search(r"^FAIL +configuration +.*modle", page, re.MULTILINE)


def test_a_mistake_in_its_own_options_is_one_line(capsys):
    assert cli.main(["doctor", "--timeout_seconds", "0"]) == 2
    assert capsys.readouterr().err == (
        "dist-siglip: error: timeout_seconds (0.0) must be in [1, 1000000]\n"
    )
    assert cli.main(["doctor", "--run_dri", "x"]) == 2
    assert "did you mean run_dir?" in capsys.readouterr().err


def test_shards_that_hang_are_told_in_bounded_time(folder, capsys, monkeypatch):
    answer, left = threading.Event(), []
    monkeypatch.setattr("dist_siglip.doctor.machine.look_at_shards", lambda *_: answer.wait())
    monkeypatch.setattr("dist_siglip.doctor.command.os._exit", left.append)
    _, page = alone(capsys, monkeypatch, "--shards", folder, "--timeout_seconds", 10)
    assert "FAIL  shards        did not come back within 10 s" in page
    assert left == [1]  # not held by the thread that still waits
    answer.set()


def test_sound_ranks_are_told_so_and_nothing_is_left(folder, shards):
    run_dir = folder / "runs"
    run_dir.mkdir()
    run = start_doctors(
        folder / "log", *_QUICK, "--run_dir", run_dir, "--shards", shards[0], world_size=3
    )
    codes, page = doctor_of_all(run)
    assert codes == [0, 0, 0], page
    assert lines_of(page, "FAIL") == []
    assert "3 ranks on 3 nodes: n0 (rank 0), n1 (rank 1), n2 (rank 2)" in page
    # Links this short may seem slow on a busy machine.
    assert re.search(r"^(ok|warn) +links", page, re.MULTILINE)
    for check in ("shared folder", "group", "ring", "two_way", "all_gather", "clocks"):
        assert re.search(rf"^ok +{check}", page, re.MULTILINE), page
    assert page.count("dist-siglip doctor on") == 1
    assert list(run_dir.iterdir()) == []


def test_a_rank_that_never_comes_is_named_in_bounded_time(folder):
    run = start_doctors(
        folder / "log", *_QUICK, "--timeout_seconds", _PATIENCE_SECONDS, world_size=3, absent=(1,)
    )
    codes, page = doctor_of_all(run)
    assert codes == [1, 1]
    assert "rank 1 of 3 did not come within 4 s; rank 0, 2 did, of n0, n2" in page


def test_without_the_first_rank_the_others_say_so(folder):
    run = start_doctors(
        folder / "log", *_QUICK, "--timeout_seconds", _PATIENCE_SECONDS, absent=(0,)
    )
    codes, page = doctor_of_all(run)
    assert codes == [1]
    assert "dist-siglip doctor on rank 1 of 2 (n1)" in page
    assert re.search(r"^FAIL +ranks +rank 0 cannot be met at 127.0.0.1:\d+", page, re.MULTILINE)


def test_each_ill_of_a_rank_is_one_line_with_a_remedy(folder, shards):
    other_shards = write_shards(folder / "other", (4, 1))
    run = start_doctors(
        folder / "log",
        *_QUICK,
        "--run_dir",
        folder,
        ills={0: ("no_sync",), 1: ("clock_ahead", "other_code", "wrong_sums")},
        own_arguments={0: ["--shards", shards[0]], 1: ["--shards", other_shards[0]]},
    )
    codes, page = doctor_of_all(run)
    assert codes == [1, 1]
    failed = "\n".join(lines_of(page, "FAIL"))
    for text in (
        "cannot sync a file: Input/output error",
        "code of dist_siglip is 0123456789ab on rank 1",
        "rank 1 (n1) is 400",
        "ring          ",
        "the sums of rank 1 are wrong",
        "shards: 00000.tar is ",
    ):
        assert text in failed, page
    lines = page.splitlines()
    for number, line in enumerate(lines):
        assert not line.startswith("FAIL") or lines[number + 1].strip().startswith("->")


@pytest.mark.parametrize(("ill", "patience"), [("dies_measuring", 4), ("hangs_measuring", 9)])
def test_a_rank_that_is_lost_while_measuring_is_told_in_bounded_time(folder, ill, patience):
    run = start_doctors(folder / "log", *_QUICK, "--timeout_seconds", patience, ills={1: (ill,)})
    codes, page = doctor_of_all(run)
    assert codes == [1, 9 if ill == "dies_measuring" else 1]
    assert re.search(r"^FAIL +group +.*rank 1", page, re.MULTILINE), page


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_rank_that_hangs_or_is_killed_while_it_looks_is_named(folder, is_killed):
    run = start_doctors(
        folder / "log",
        *_QUICK,
        "--timeout_seconds",
        _PATIENCE_SECONDS,
        "--run_dir",
        folder,
        ills={1: ("hangs_looking",)},
        own_arguments={1: ["--shards", folder]},
    )
    if is_killed:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not any(path.name.startswith(".dist_siglip-doctor") for path in folder.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.kill(1)
    codes, page = doctor_of_all(run)
    assert codes == [1, -9 if is_killed else 1]
    told = "rank 1 (n1) came, and was not done within 4 s"
    assert (told if is_killed else "rank 1: did not come back within 3.2 s") in page
    assert not any(path.name.startswith(".dist_siglip-doctor") for path in folder.iterdir())
