"""A run that is preempted and then loses a node ends as if nothing had happened."""

import pytest
import torch

from tests.support.cluster_runs import ClusterRun, write_cluster_settings
from tests.support.recording import global_batches
from tests.support.slurm_cluster import wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS = 60


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_cluster_settings(tmp_path_factory.mktemp("settings"), STEPS)


@pytest.fixture(scope="module")
def calm(cluster, settings, tmp_path_factory):
    """A run on two nodes with two ranks each, to which nothing happens."""
    calm = ClusterRun(tmp_path_factory.mktemp("runs") / "calm", settings)
    job = calm.submit(cluster, ranks_per_node=2)
    job.wait_for("COMPLETED", "FAILED", seconds=150)
    assert job.exit_code == 0, job.output
    return calm


@pytest.fixture(scope="module")
def hit(cluster, settings, calm, tmp_path_factory):
    """The same run, preempted by an urgent job; when it goes on, its second node dies."""
    hit = ClusterRun(tmp_path_factory.mktemp("runs") / "hit", settings)
    hit.brake.touch()
    job = hit.submit(cluster, ranks_per_node=2)
    hit.wait_for_checkpoint_after(0, job)
    cluster.submit_command("sleep 1", "--partition=high", "--nodes=2", "--exclusive")
    wait_until(lambda: job.restarts == 1, 60, lambda: job.output)
    hit.preempted_at = hit.newest()
    job.wait_for_restart(1)
    hit.wait_for_checkpoint_after(hit.preempted_at, job)
    cluster.kill_node("127.0.0.2")
    hit.lost_at = hit.newest()
    wait_until(lambda: job.restarts == 2, 60, lambda: job.output)
    cluster.start_node("127.0.0.2")
    job.wait_for_restart(2)
    hit.wait_for_checkpoint_after(hit.lost_at, job)
    hit.brake.unlink()
    job.wait_for("COMPLETED", "FAILED", seconds=150)
    assert job.exit_code == 0, job.output
    return hit


def test_four_ranks_on_two_nodes_finish(calm):
    assert calm.newest() == STEPS
    assert calm.run.report.exists()


def test_each_start_goes_on_where_the_last_checkpoint_was_written(hit):
    assert hit.starts() == [hit.preempted_at, hit.lost_at]
    assert "asked to stop (SIGUSR1)" in hit.run.log.read_text()


def test_no_batch_is_lost_and_every_batch_is_the_one_of_the_calm_run(calm, hit):
    batches = global_batches(hit.samples)
    assert list(batches) == list(range(1, STEPS + 1))
    assert batches == global_batches(calm.samples)


def test_the_loss_of_every_step_is_that_of_the_calm_run(calm, hit):
    assert hit.losses() == calm.losses()


def test_the_final_weights_and_moments_are_those_of_the_calm_run(calm, hit):
    first, second = calm.state(STEPS), hit.state(STEPS)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
