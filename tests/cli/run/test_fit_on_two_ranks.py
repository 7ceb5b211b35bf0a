"""Twenty steps of ``fit`` on two ranks: which samples they see, and what the run leaves."""

import json
import statistics

from dist_siglip.runs import RunFolder
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked
from tests.support.recording import global_batches

STEPS = 20


def test_two_ranks_train_twenty_steps(tmp_path):
    settings = write_settings(tmp_path, max_steps=STEPS, devices=2)
    recording = [
        "--trainer.callbacks+=tests.support.recording.RecordSamples",
        f"--trainer.callbacks.folder={tmp_path / 'order'}",
    ]
    done = run_forked("fit", "--config", settings, *recording, world_size=2)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr

    batches = global_batches(tmp_path / "order")
    assert list(batches) == list(range(1, STEPS + 1))
    epochs = [[i for s in range(first, first + 6) for i in batches[s]] for first in (1, 7, 13)]
    assert all(sorted(epoch) == list(range(72)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]

    run = RunFolder(tmp_path / "run")
    assert run.steps_with_checkpoint() == [16, STEPS]
    for path in (run.config, run.provenance, run.log, run.report):
        assert path.stat().st_size > 0, path
    lines = map(json.loads, run.metrics.read_text().splitlines())
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == STEPS
    assert statistics.mean(losses[-6:]) < statistics.mean(losses[:6])
    evaluation = json.loads((run.evaluation / "metrics.json").read_text())
    assert (evaluation["step"], evaluation["gallery_pairs"]) == (STEPS, 20)
