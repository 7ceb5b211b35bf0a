"""``stop.requeue``: a job whose batch script knows nothing of exit codes puts itself back."""

import shlex

from tests.support.cluster_runs import SMALL, ClusterRun, write_cluster_settings
from tests.support.recording import global_batches

STEPS = 30


def test_a_run_requeues_its_own_job_once_all_ranks_have_saved(cluster, tmp_path):
    it = ClusterRun(tmp_path / "it", write_cluster_settings(tmp_path, STEPS))
    it.brake.touch()
    words = ["fit", "--config", it.settings, "--run_dir", it.run.path, *it.observed()]
    words += ["--trainer.devices", 2, "--stop.requeue", "true"]
    command = f"srun python -m dist_siglip {shlex.join(map(str, words))}"
    options = ("--ntasks-per-node=2", "--requeue", "--open-mode=append")
    job = cluster.submit_command(command, *options, f"--output={tmp_path}/%j.out", *SMALL)
    it.wait_for_checkpoint_after(0, job)
    job.signal("USR2")
    job.wait_for_restart(1)
    saved = it.newest()
    it.brake.unlink()
    job.wait_for("COMPLETED", "FAILED")
    assert job.exit_code == 0, job.output
    assert it.starts() == [saved]
    assert "is requeued" in it.run.log.read_text()
    assert list(global_batches(it.samples)) == list(range(1, STEPS + 1))
