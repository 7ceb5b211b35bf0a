"""``fit`` on Parquet files: samples and losses of a run on tars, through a kill and new ranks."""

import json

import pytest
import yaml

from dist_siglip.bench.data import write_parquet_copies
from dist_siglip.runs import RunFolder
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked, start
from tests.support.recording import global_batches

pytestmark = pytest.mark.e2e
STEPS = 10


def recording(folder):
    return [
        "--trainer.callbacks+=tests.support.recording.RecordSamples",
        f"--trainer.callbacks.folder={folder}",
    ]


def losses(run):
    lines = map(json.loads, RunFolder(run).metrics.read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_killed_on_two_ranks_and_resumed_on_one_sees_what_a_run_on_tars_sees(tmp_path):
    """Files that are not compressed and of snappy, as sources of a mixture with tars."""
    settings = write_settings(tmp_path, max_steps=STEPS, val_check_interval=STEPS)
    values = yaml.safe_load(settings.read_text())
    tars = sorted(map(str, (tmp_path / "data").glob("train-*.tar")))
    plain, snappy, *_ = write_parquet_copies(tars, tmp_path / "copies").values()
    runs = {"tars": tars, "parquet": [snappy[0], plain[1], tars[2]]}
    for name, shards in runs.items():
        values["data"]["train_shards"] = None
        values["data"]["train_sources"] = [
            {"name": "a", "shards": shards[:2], "weight": 2.0},
            {"name": "b", "shards": shards[2], "weight": 1.0},
        ]
        values["run_dir"] = str(tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    words = ["fit", "--config", tmp_path / "tars.yaml", *recording(tmp_path / "of-tars")]
    done = run_forked(*words)
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "parquet")
    words = ["fit", "--config", tmp_path / "parquet.yaml", *recording(tmp_path / "order")]
    ranks = start([*words, "--trainer.devices=2"], tmp_path / "log", 2)
    assert ranks.wait_until(lambda: 4 in run.steps_with_checkpoint()), ranks.said()
    ranks.kill()
    (tmp_path / "order").rename(tmp_path / "before")
    resumed_from = max(run.steps_with_checkpoint())
    done = run_forked(*words)
    assert done.returncode == 0, done.stderr
    expected = global_batches(tmp_path / "of-tars")
    before = global_batches(tmp_path / "before")
    assert {step: before[step] for step in range(1, 5)} == {s: expected[s] for s in range(1, 5)}
    assert global_batches(tmp_path / "order") == {
        step: expected[step] for step in range(resumed_from + 1, STEPS + 1)
    }
    logged, curve = losses(run.path), losses(tmp_path / "tars")
    assert {5, STEPS} <= set(logged)
    assert logged == pytest.approx({step: curve[step] for step in logged}, rel=1e-4)
