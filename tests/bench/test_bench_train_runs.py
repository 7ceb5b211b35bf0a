"""Runs that ``bench train`` starts: ours for real, open_clip_train as a stand-in with its log."""

import json
import os
import sys

import pytest

from dist_siglip.bench.data import write_photo_shards
from dist_siglip.bench.train_clock import PHASES
from dist_siglip.bench.train_runs import TrainCase, run_open_clip, run_ours
from dist_siglip.errors import UserError
from tests.support.command import REPOSITORY
from tests.support.ports import next_port
from tests.support.tiny_models import ARCHITECTURES, write_config

pytestmark = pytest.mark.e2e

# What the real trainer takes and writes, at 50 batches per second, and what breaks it on a CPU.
STAND_IN = """
import json, logging, os, sys, time
from pathlib import Path
import open_clip, torch
from open_clip_train import data

def main(arguments):
    given = dict(a.removeprefix("--").split("=", 1) for a in arguments if "=" in a)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
        torch.nn.parallel.DistributedDataParallel(
            torch.nn.Linear(2, 2), device_ids=[torch.device(given["device"])]
        )
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") != "0":
        return
    seen = {
        **given,
        "arguments": arguments,
        "threads": torch.get_num_threads(),
        "is_known": given["model"] in open_clip.list_models(),
        "buffer": [data._SAMPLE_SHUFFLE_INITIAL, data._SAMPLE_SHUFFLE_SIZE],
    }
    Path(given["logs"], "seen.json").write_text(json.dumps(seen))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    samples, pairs = int(given["train-num-samples"]), int(given["batch-size"])
    pairs *= int(os.environ.get("WORLD_SIZE", 1))
    steps, every = samples // pairs, int(given["log-every-n-steps"])
    for step in range(steps):
        time.sleep(0.02)
        if step % every == 0 or step == steps - 1:
            logging.info(
                f"Train Epoch: 0 [{(step + 1) * pairs:>5}/{samples} ({step / steps:.0%})] "
                "Data (t): 0.004 Batch (t): 0.020, 200.000/s, 200.000/s/gpu LR: 0.000100 "
                "Logit Scale: 10.000 Contrastive_loss: 9.6094 (9.6094) Loss: 9.6094 (9.6094)"
            )
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    return TrainCase(
        world_size=1,
        model=write_config(folder / "tiny.json", ARCHITECTURES["clip"]),
        shards=tuple(write_photo_shards(folder / "photos", (96, 80), 48, 2)),
        local_batch_size=4,
        workers=1,
        threads=1,
        precision="32-true",
        device="cpu",
        compile_towers=False,
        warmup_steps=10,
        steps=20,
    )


def on_two_ranks(case):
    return TrainCase(**{**vars(case), "world_size": 2})


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put a trainer of that name before any other; returns its module to write."""
    package = tmp_path / "packages" / "open_clip_train"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "data.py").write_text("_SAMPLE_SHUFFLE_SIZE, _SAMPLE_SHUFFLE_INITIAL = 5000, 1000\n")
    (package / "main.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(package.parent), str(REPOSITORY))))
    return package / "main.py"


def stub_open_clip(stand_in, text):
    """Put a package in the place of open_clip, whose import takes long."""
    package = stand_in.parents[1] / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text(text)


def test_open_clip_is_given_the_same_and_timed_by_its_log(case, stand_in, tmp_path):
    found = run_open_clip(case, tmp_path, sys.executable)
    assert 50 < found.samples_per_second < 220  # 4 pairs in 20 ms, or longer on a busy machine
    assert found.shares == {"data": pytest.approx(0.2)}
    assert found.peak_bytes > 50e6
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["train-data"].split("::") == list(case.shards)
    assert (seen["batch-size"], seen["workers"], seen["precision"]) == ("4", "1", "fp32")
    assert (seen["grad-clip-norm"], seen["threads"]) == ("1.0", 1)
    assert (seen["model"], seen["is_known"]) == ("tiny", True)
    assert seen["buffer"] == [1000, 1000]
    assert "--siglip" in seen["arguments"]
    assert "--torchcompile" not in seen["arguments"]


def test_open_clip_trains_on_two_processes_of_a_cpu(case, stand_in, tmp_path):
    found = run_open_clip(on_two_ranks(case), tmp_path, sys.executable)
    assert 100 < found.samples_per_second < 440


def test_a_trainer_without_a_log_is_of_another_version(case, stand_in, tmp_path):
    stand_in.write_text("def main(arguments):\n    print('Train step 1')\n")
    stub_open_clip(stand_in, "add_model_config = print\n")
    with pytest.raises(UserError, match=r"no log as version 3\.3 does; install open_clip_torch"):
        run_open_clip(case, tmp_path, sys.executable)


def test_what_a_run_complains_of_is_told(case, stand_in, tmp_path):
    stub_open_clip(stand_in, "import no_such_module\n")
    message = "open_clip_train ended with code 1: ModuleNotFoundError: No module named 'no_such_mod"
    with pytest.raises(UserError, match=message):
        run_open_clip(case, tmp_path, sys.executable)


def test_our_run_is_a_fit_whose_log_says_the_same(case, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(next_port()))
    found = run_ours(on_two_ranks(case), tmp_path)
    assert tuple(found.shares) == PHASES
    assert min(found.shares.values()) > 0
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.gemm_flops_per_second > 1e9
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    logged = {line["step"]: line["train/pairs_per_second"] for line in lines}
    assert sorted(logged) == [10, 20, 30]
    # The log's two intervals are the clock's one.
    assert found.samples_per_second == pytest.approx(2 / (1 / logged[20] + 1 / logged[30]), rel=0.2)
