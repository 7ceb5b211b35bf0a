"""``slurm render`` prints the shipped scripts with a run in them; ``submit`` submits just that."""

import os
import shlex
import subprocess

import pytest

from dist_siglip.cli import main
from tests.support.command import REPOSITORY

CONFIG = "data: {global_batch_size: 64}\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.yaml").write_text(CONFIG)
    (tmp_path / "sweep.txt").write_text("--seed_everything 1\n--seed_everything 2\n")


@pytest.fixture
def render(capsys):
    def render(*options, command="render"):
        assert main(["slurm", command, "it.yaml", "--run_dir", "runs/it", *options]) == 0
        return capsys.readouterr().out

    return render


def directives(script):
    lines = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    return dict(line.split("=", 1) if "=" in line else (line, "") for line in lines)


def shipped(name):
    return (REPOSITORY / "slurm" / f"{name}.sbatch").read_text()


CONTAINER = ("--container=pyxis", "--image=i.sqsh", "--mounts=/shared:/shared")
SCRIPTS = {
    "train": (),
    "train_torchrun": (),
    "train_container": CONTAINER,
    "sweep_array": ("--sweep=sweep.txt",),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_resources_and_the_run_differ_from_the_shipped_script(name, render):
    options = (f"--script={name}", "--gpus_per_node=4", *SCRIPTS[name])
    ours, theirs = render(*options).splitlines(), shipped(name).splitlines()
    mine = [line for line in ours if line not in theirs]
    assert mine[0] == "# Rendered by dist-siglip slurm."
    assert all(line.startswith(("#", "export DIST_SIGLIP_", "set -- ")) for line in mine)
    missing = [line for line in theirs if line not in ours and not line.startswith("#")]
    assert missing == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_rendered_is_bash(name, render):
    script = render(f"--script={name}", *SCRIPTS[name])
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_resources_are_the_ones_asked_for(render):
    lines = directives(
        render(
            "--nodes=4",
            "--gpus_per_node=4",
            "--cpus_per_gpu=7",
            "--time=1-12:00:00",
            "--save_seconds=300",
            "--partition=gpu",
            "--account=me",
            '--directives=["--constraint=a100"]',
        )
    )
    assert lines["--nodes"] == lines["--ntasks-per-node"] == lines["--gpus-per-node"] == "4"
    assert lines["--cpus-per-task"] == "7"
    assert lines["--time"] == "1-12:00:00"
    assert lines["--signal"] == "USR1@300"
    assert (lines["--partition"], lines["--account"], lines["--constraint"]) == (
        "gpu",
        "me",
        "a100",
    )
    assert {"--requeue", "--open-mode"} <= set(lines)


def test_torchrun_has_one_task_a_node_with_the_processors_of_all_its_ranks(render):
    lines = directives(render("--script=train_torchrun", "--gpus_per_node=4", "--cpus_per_gpu=7"))
    assert (lines["--ntasks-per-node"], lines["--cpus-per-task"]) == ("1", "28")


def test_a_sweep_is_an_array_over_its_lines(render):
    lines = directives(render("--script=sweep_array", "--sweep=sweep.txt", "--at_once=1"))
    assert lines["--array"] == "0-1%1"


def test_arguments_arrive_as_they_were_given(render):
    """Whatever they hold, bash takes them for words, not for commands."""
    odd = ["--a", "two words", "$(touch broken)", "`touch broken`", "it's", "#"]
    script = render("--setup=it.yaml", "--", *odd)
    (start,) = [line for line in script.splitlines() if line.startswith("set -- ")]
    shown = subprocess.run(
        ["bash", "-c", f'{start}\nprintf "%s\\n" "$@"'], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == ["it.yaml", "--run_dir", "runs/it", *odd]
    assert shlex.split(start)[2:] == ["it.yaml", "--run_dir", "runs/it", *odd]
    assert not os.path.exists("broken")


def test_submit_gives_sbatch_exactly_what_it_prints(render, tmp_path, monkeypatch):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/bash\ncat > submitted\necho "Submitted batch job 7 ($#)"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    printed = render("--nodes=1", command="submit")
    script = (tmp_path / "submitted").read_text()
    assert printed == f"{script}\nSubmitted batch job 7 (0)\n"
    assert script == render("--nodes=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes=0"], "nodes (0) must be at least 1"),
        (["--nodes=3"], "data.global_batch_size (64) must be divisible by nodes x gpus_per_node"),
        (["--", "--data.global_batch_size=50"], "data.global_batch_size (50) must be divisible"),
        (["--time=90"], "time (90) must be [DAYS-]HH:MM:SS"),
        (["--time=00:04:00"], "time (00:04:00) must be longer than save_seconds (180)"),
        (["--job_name=bash"], "job_name (bash) makes Lightning take the job for no job of SLURM"),
        (["--partition=a b"], "partition (a b) may have letters"),
        (["--account=x\n#SBATCH --qos=high"], "account (x #SBATCH --qos=high) may have letters"),
        (['--directives=["constraint=a100"]'], "directives (constraint=a100) must be long options"),
        (['--directives=["--time=99:00:00"]'], "directives (--time=99:00:00) must be long options"),
        (["--setup=nowhere.sh"], "setup (nowhere.sh) is no file"),
        (["--script=sweep_array"], "script (sweep_array) needs sweep"),
        (["--script=train_container", *CONTAINER[:2]], "script (train_container) needs mounts"),
        (["--sweep=sweep.txt"], "sweep (sweep.txt) is for script sweep_array"),
        (
            ["--script=sweep_array", "--sweep=it.yaml", "--at_once=0"],
            "at_once (0) must be at least",
        ),
        (["--", "--a\nrm -rf"], "option of fit ('--a\\nrm -rf') must be one printable line"),
        (["--nods=2"], "did you mean nodes?"),
    ],
)
def test_a_wrong_value_is_one_line_and_nothing_is_printed_or_submitted(options, message, capsys):
    assert main(["slurm", "submit", "it.yaml", "--run_dir=runs/it", *options]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_sweep_with_an_empty_line_is_refused(capsys, tmp_path):
    (tmp_path / "sweep.txt").write_text("--seed_everything 1\n\n--seed_everything 2\n")
    options = ["--script=sweep_array", "--sweep=sweep.txt"]
    assert main(["slurm", "render", "it.yaml", "--run_dir=runs/it", *options]) == 2
    assert "sweep (sweep.txt) has no options in line 2" in capsys.readouterr().err


def test_without_sbatch_it_says_where_to_submit(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["slurm", "submit", "it.yaml", "--run_dir=runs/it"]) == 2
    assert "submit on a login node of the cluster" in capsys.readouterr().err


def test_what_sbatch_refuses_is_told(capsys, monkeypatch, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 'no such partition' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["slurm", "submit", "it.yaml", "--run_dir=runs/it"]) == 2
    assert "sbatch refused the job: no such partition" in capsys.readouterr().err
