"""Runs whose rank dies, that are cancelled, or that are tasks of an array or of torchrun."""

import os
import signal
import time

import pytest

from tests.support.cluster_runs import SMALL, ClusterRun, submit_warm, write_cluster_settings
from tests.support.recording import global_batches
from tests.support.slurm_cluster import KILL_WAIT_SECONDS, wait_until

STEPS = 40


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_cluster_settings(tmp_path_factory.mktemp("settings"), STEPS)


def test_a_killed_rank_ends_the_job_and_the_next_one_goes_on_until_it_is_cancelled(
    cluster, settings, tmp_path
):
    it = ClusterRun(tmp_path / "it", settings)
    it.brake.touch()
    job = it.submit(cluster)
    it.wait_for_checkpoint_after(0, job)
    os.kill(cluster.rank(job, 1), signal.SIGKILL)
    started = time.monotonic()
    job.wait_for("FAILED")
    assert time.monotonic() - started < 10 * (KILL_WAIT_SECONDS + 5)
    assert job.exit_code != 0
    assert job.restarts == 0
    kept = it.newest()

    job = it.submit(cluster)
    it.wait_for_checkpoint_after(kept, job)
    before = it.newest()
    it.wait_for_batch_after(before, job)
    job.cancel()
    job.wait_for("CANCELLED")
    wait_until(lambda: cluster.rank(job, 0) is None)
    assert it.starts() == [kept]
    assert it.newest() > before  # saved at once, not at the next multiple of five
    assert "asked to stop (SIGTERM)" in it.run.log.read_text()
    assert job.state == "CANCELLED"
    assert job.restarts == 0


def test_the_last_task_of_an_array_is_requeued_alone_and_goes_on(cluster, settings, tmp_path):
    runs = [ClusterRun(tmp_path / "runs" / str(task), settings) for task in range(2)]
    sweep = tmp_path / "sweep.txt"
    lines = [" ".join([*run.observed(), f"--seed_everything {i}"]) for i, run in enumerate(runs)]
    sweep.write_text("\n".join(lines) + "\n")
    runs[1].brake.parent.mkdir()
    runs[1].brake.touch()
    array = submit_warm(
        cluster,
        "sweep_array.sbatch",
        settings,
        sweep,
        tmp_path / "runs",
        options=("--array=0-1", "--ntasks-per-node=1", "--gpus-per-node=1", *SMALL),
    )
    first, last = array.task(0), array.task(1)
    runs[1].wait_for_checkpoint_after(0, last)
    last.signal("USR1")
    last.wait_for_restart(1)
    runs[1].brake.unlink()
    for task in (first, last):
        task.wait_for("COMPLETED", "FAILED")
        assert task.exit_code == 0, task.output
    assert (first.restarts, last.restarts) == (0, 1)
    assert len(runs[1].starts()) == 1
    for run in runs:
        assert run.newest() == STEPS
        assert list(global_batches(run.samples)) == list(range(1, STEPS + 1))


def test_ranks_of_torchrun_are_requeued_and_finish(cluster, settings, tmp_path):
    it = ClusterRun(tmp_path / "it", settings)
    it.brake.touch()
    job = it.submit(cluster, "train_torchrun.sbatch")
    it.wait_for_checkpoint_after(0, job)
    job.signal("USR1")
    wait_until(lambda: job.restarts == 1, lambda: job.output)
    stopped_at = it.newest()
    it.brake.unlink()
    job.wait_for_restart(1)
    job.wait_for("COMPLETED", "FAILED")
    assert job.exit_code == 0, job.output
    assert it.starts() == [stopped_at]
    assert list(global_batches(it.samples)) == list(range(1, STEPS + 1))
