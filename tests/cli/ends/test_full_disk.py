"""A run whose logs, evaluation and report cannot be written trains to its end, and says so."""

import subprocess
from pathlib import Path

import pytest

from tests.support.command import REPOSITORY, environment, write_settings
from tests.support.forked_runs import warm_python
from tests.support.processes import LIMIT_SECONDS


@pytest.mark.faults
def test_fit_ends_well_where_nothing_but_checkpoints_can_be_written(tmp_path):
    settings = write_settings(tmp_path, max_steps=4, val_check_interval=4)
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.txt").symlink_to("/dev/full")
    # Files and folders that cannot be made.
    (run / "metrics.jsonl").symlink_to(tmp_path / "gone" / "metrics.jsonl")
    (run / "provenance.json").mkdir()
    for name in ("evaluation", "tensorboard"):
        (run / name).symlink_to(tmp_path / "gone")
    # What SLURM writes down of a job may be on the same disk.
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [warm_python(), "-m", "dist_siglip", "fit", "--config", str(settings)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=REPOSITORY,
            timeout=LIMIT_SECONDS,
        )
    assert done.returncode == 0, done.stderr
    assert (run / "checkpoints" / "step=00000004.ckpt").exists()
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if "cannot be written" in line]
    assert len([line for line in told if "metrics cannot be written" in line]) == 1
    assert len([line for line in told if "the log cannot be written" in line]) == 1
    assert len([line for line in told if "TensorBoard cannot be written" in line]) == 1
    assert any("evaluation/metrics.json cannot be written" in line for line in told)
    assert any("provenance.json cannot be written" in line for line in told)
    assert any("the report cannot be written" in line for line in told)
    assert "lines of metrics still wait for room" in done.stderr
