"""What the batch scripts make of signals and exit codes, on a real SLURM with actors as ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import actor
from tests.support.slurm_cluster import Job, wait_until

SMALL = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--mem=100")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder with a ``python`` that plays, and stand-ins for what starts containers."""
    folder = tmp_path_factory.mktemp("stage")
    play(folder / "python", f'exec {sys.executable} {actor.__file__} "$@"')
    # exec --nv --bind MOUNTS IMAGE COMMAND ...
    play(
        folder / "apptainer",
        '[ "$1 $2 $3" = "exec --nv --bind" ] || exit 9\n'
        'export CONTAINER="apptainer $4 $5"; shift 5; exec "$@"',
    )
    # pyxis takes its options out of srun's.
    play(
        folder / "srun",
        "for word; do shift; case $word in\n"
        "  --container-image=*) image=${word#*=} ;; --container-mounts=*) mounts=${word#*=} ;;\n"
        '  --no-container-mount-home) ;; *) set -- "$@" "$word" ;;\nesac; done\n'
        '[ -z "${image:-}" ] || export CONTAINER="pyxis $mounts $image"\n'
        f'exec {shutil.which("srun")} "$@"',
    )
    (folder / "setup.sh").write_text(f'export PATH="{folder}:$PATH"\n')
    return folder


def play(path, script):
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def submit(cluster, stage, tmp_path):
    jobs = []

    def submit(script, *arguments, part="wait", options=(), **variables):
        job = cluster.submit(
            script,
            *arguments,
            options=(*SMALL, *options),
            DIST_SIGLIP_SETUP=str(stage / "setup.sh"),
            ACTOR_PART=str(part),
            ACTOR_NOTES=str(tmp_path),
            **variables,
        )
        jobs.append(job)
        return job

    yield submit
    for job in jobs:
        job.cancel()


def notes(folder, job, restart=0):
    """What each rank of a job was started with, by rank."""
    found = sorted(Path(folder).glob(f"{job.number}-*-{restart}.json"))
    return [json.loads(path.read_text()) for path in found]


def wait_for_ranks(folder, job, restart=0, ranks=4):
    wait_until(lambda: len(notes(folder, job, restart)) == ranks, lambda: job.output)


def test_ranks_get_the_arguments_the_world_and_one_place_to_meet(submit, tmp_path):
    job = submit("train.sbatch", "a config.yaml", "--run_dir", "runs/it", part=0)
    job.wait_for("COMPLETED")
    ranks = notes(tmp_path, job)
    assert len(ranks) == 4
    fit = ["-m", "dist_siglip", "fit", "--config", "a config.yaml", "--run_dir", "runs/it"]
    assert ranks[0]["arguments"] == [*fit, "--trainer.num_nodes", "2", "--trainer.devices", "2"]
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}
    assert {rank["MASTER_PORT"] for rank in ranks} == {str(10000 + int(job.number))}
    # Every rank sees the GPUs of its node, not one of its own.
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in ranks} == {"0,1"}


def test_a_job_asked_to_stop_is_requeued_until_the_cap_and_leaves_with_75(submit, tmp_path):
    job = submit("train.sbatch", "x.yaml", DIST_SIGLIP_MAX_REQUEUES="1")
    wait_for_ranks(tmp_path, job)
    job.signal("USR1")
    job.wait_for_restart(1)
    wait_for_ranks(tmp_path, job, restart=1)
    job.signal("USR2")
    job.wait_for("FAILED")
    assert job.exit_code == 75
    assert job.restarts == 1


@pytest.mark.parametrize("script", ["train.sbatch", "train_torchrun.sbatch"])
def test_a_job_that_is_cancelled_saves_and_stays_cancelled(script, submit, tmp_path):
    job = submit(script, "x.yaml")
    wait_for_ranks(tmp_path, job)
    job.cancel()
    job.wait_for("CANCELLED")
    assert job.restarts == 0


def test_the_time_limit_asks_the_ranks_ahead_of_time(submit, tmp_path):
    """SLURM counts in minutes, and may ask up to one minute early: here, not before the ranks are
    up, and with most of a minute left for what they do."""
    job = submit("train.sbatch", "x.yaml", options=("--time=2", "--signal=USR1@50"))
    job.wait_for_restart(1)


@pytest.mark.parametrize("code", [2, 3, 70])
def test_a_job_that_failed_ends_with_the_code_and_is_not_requeued(code, submit):
    job = submit("train.sbatch", "x.yaml", part=code)
    job.wait_for("FAILED")
    assert job.exit_code == code
    assert job.restarts == 0


def test_torchrun_passes_75_on_to_the_job(submit, tmp_path):
    job = submit("train_torchrun.sbatch", "x.yaml", options=("--ntasks-per-node=1",))
    wait_for_ranks(tmp_path, job)
    assert notes(tmp_path, job)[3]["arguments"][-4:] == [
        "--trainer.num_nodes", "2", "--trainer.devices", "2",
    ]  # fmt: skip
    job.signal("USR1")
    job.wait_for_restart(1)
    wait_for_ranks(tmp_path, job, restart=1)


def test_torchrun_passes_a_failure_on_to_the_job(submit):
    job = submit("train_torchrun.sbatch", "x.yaml", part=2, options=("--ntasks-per-node=1",))
    job.wait_for("FAILED")
    assert job.exit_code == 2


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_every_rank_is_started_in_the_container(runtime, submit, tmp_path):
    """By stand-ins for pyxis and apptainer, which are called as these would be."""
    job = submit(
        "train_container.sbatch",
        "x.yaml",
        part=0,
        DIST_SIGLIP_CONTAINER=runtime,
        DIST_SIGLIP_IMAGE="an image.sif",
        DIST_SIGLIP_MOUNTS="/shared",
    )
    job.wait_for("COMPLETED", "FAILED")
    ranks = notes(tmp_path, job)
    assert [rank["CONTAINER"] for rank in ranks] == [f"{runtime} /shared an image.sif"] * 4
    assert ranks[0]["arguments"][:5] == ["-m", "dist_siglip", "fit", "--config", "x.yaml"]


def test_slurm_submit_submits_what_it_prints(cluster, stage, tmp_path):
    (tmp_path / "it.yaml").write_text("data: {global_batch_size: 8}\n")
    command = ["slurm", "submit", "it.yaml", "--run_dir=runs/it", "--gpus_per_node=2"]
    command += ["--cpus_per_gpu=1", f"--setup={stage / 'setup.sh'}"]
    actor_of = {"ACTOR_PART": "0", "ACTOR_NOTES": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "dist_siglip", *command, "--", "--seed_everything", "5"],
        env={**cluster.environment(), **actor_of},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    printed, _, answer = done.stdout.rpartition("\nSubmitted batch job ")
    job = Job(cluster, answer.strip())
    assert cluster.script_of(job) == printed
    job.wait_for("COMPLETED", "FAILED")
    assert "--run_dir runs/it --seed_everything 5" in " ".join(notes(tmp_path, job)[3]["arguments"])
