"""A run that is preempted and then loses a node ends as if nothing had happened."""

import time

import pytest
import torch

from tests.support.cluster_runs import ClusterRun, write_cluster_settings
from tests.support.recording import global_batches
from tests.support.slurm_cluster import wait_until

STEPS = 60


# A signal that did not reach a lost node is sent again after a minute, to whatever has the job's
# number then; SLURM's own delay of two minutes, which the tests cut short, is there for that.
RETRY_SECONDS = 75


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory):
    """A run nothing happens to, and one that is preempted, goes on, and loses its second node.

    Each has two ranks on each of two nodes.
    """
    folder = tmp_path_factory.mktemp("runs")
    settings = write_cluster_settings(folder, STEPS)
    calm, hit = ClusterRun(folder / "calm", settings), ClusterRun(folder / "hit", settings)
    hit.brake.touch()
    job = hit.submit(cluster, ranks_per_node=2)
    hit.wait_for_checkpoint_after(0, job)
    cluster.submit_command("sleep 1", "--partition=high", "--nodes=2", "--exclusive")
    wait_until(lambda: job.restarts == 1, lambda: job.output)
    hit.preempted_at = hit.newest()
    job.wait_for_restart(1)
    hit.wait_for_checkpoint_after(hit.preempted_at, job)
    cluster.kill_node("127.0.0.2")
    wait_until(lambda: job.restarts == 2, lambda: job.output)
    lost = time.monotonic()
    cluster.start_node("127.0.0.2")
    wait_until(lambda: cluster.states_of_nodes() == {"idle"})
    hit.lost_at = hit.newest()  # the first rank, on the other node, may have written one after it

    undisturbed = calm.submit(cluster, ranks_per_node=2)
    undisturbed.wait_for("COMPLETED", "FAILED")
    assert undisturbed.exit_code == 0, undisturbed.output

    time.sleep(max(0.0, lost + RETRY_SECONDS - time.monotonic()))
    hit.brake.unlink()
    job.wait_for_restart(2)
    job.wait_for("COMPLETED", "FAILED")
    assert job.exit_code == 0, job.output
    return calm, hit


@pytest.fixture
def calm(runs):
    return runs[0]


@pytest.fixture
def hit(runs):
    return runs[1]


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
    """All but the line of the checkpoint after which the node was lost, which may be missing."""
    expected, logged = calm.losses(), hit.losses()
    assert list(expected) == list(range(1, STEPS + 1))
    assert expected.keys() - logged.keys() <= {hit.lost_at}
    assert logged == {step: expected[step] for step in logged}


def test_the_final_weights_and_moments_are_those_of_the_calm_run(calm, hit):
    first, second = calm.state(STEPS), hit.state(STEPS)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
