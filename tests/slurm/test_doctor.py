"""The doctor inside a job, before the run, on a real SLURM."""

import re


def test_srun_doctor_looks_at_every_node_of_a_job(cluster, tmp_path):
    job = cluster.submit_command(
        f"srun dist-siglip doctor --run_dir {tmp_path} --write_mib=1 --local_batch_size=64",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=2",
        f"--output={tmp_path}/out",
        "--job-name=train",
    )
    job.wait_for("COMPLETED", "FAILED")
    page = (tmp_path / "out").read_text()
    assert job.exit_code == 0, page
    assert "2 ranks on 2 nodes: 127.0.0.1 (rank 0), 127.0.0.2 (rank 1)" in page
    for check in ("shared folder", "group", "ring", "clocks"):
        assert re.search(rf"^ok +{check}", page, re.MULTILINE), page
    assert page.count("dist-siglip doctor on") == 1
