"""A run whose steps are all bad ends by itself, with the names of the samples, in one line."""

import json
import re

import pytest

from dist_siglip.runs import RunFolder
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked

pytestmark = pytest.mark.e2e


def test_a_learning_rate_that_destroys_the_weights_ends_the_run_with_code_3(tmp_path):
    """The first step throws the weights far away; none after it is finite."""
    settings = write_settings(tmp_path)
    done = run_forked(
        "fit",
        "--config",
        settings,
        "--model.optim.learning_rate=1e30",
        "--step_guard.abort_after=3",
        "--trainer.log_every_n_steps=2",
    )
    assert done.returncode == 3, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dist-siglip: failed: 3 steps in a row were skipped, 2 to 4, and")
    folder = RunFolder(tmp_path / "run")
    lines = [json.loads(line) for line in folder.skipped_steps.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4]
    for line in lines:
        keys = [key for of_shard in line["samples"].values() for key in of_shard]
        assert len(set(keys)) == 12
        assert all(shard.endswith(".tar") for shard in line["samples"])
    logged = map(json.loads, folder.metrics.read_text().splitlines())
    assert [line["train/skipped_steps"] for line in logged] == [1]
    # The scale is 0 by then; what a product with it makes of nan differs between processors.
    told = r"step 2 was skipped on all ranks: (loss|gradient) is not finite; 12 of 12 samples gave"
    assert re.search(told, folder.log.read_text())
