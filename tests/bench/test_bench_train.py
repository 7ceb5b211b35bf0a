"""``bench train`` measures whole runs, says where their time goes, and compares like with like."""

import json

import pytest
import torch

from dist_siglip.bench import train as bench_train
from dist_siglip.bench.data import write_photo_shards
from dist_siglip.bench.train_clock import gemm_rate, step_flops
from dist_siglip.bench.train_runs import TrainSpeed
from dist_siglip.cli import main
from dist_siglip.models import build_dual_encoder
from tests.support.tiny_models import ARCHITECTURES, write_config

SHARES = {"data": 0.1, "towers": 0.6, "loss": 0.1, "optimizer": 0.1, "rest": 0.1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_photo_shards(tmp_path_factory.mktemp("photos"), (96, 80), 48, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("model") / "tiny.json", ARCHITECTURES["clip"])


@pytest.fixture
def pretended(monkeypatch):
    """Runs of known speed: ours 300, 100, 200 samples/s, open_clip's 100."""
    seen, rates = [], iter([300.0, 100.0, 200.0])

    def ours(case, folder):
        seen.append(("ours", case, folder))
        return TrainSpeed(
            samples_per_second=next(rates),
            shares=SHARES,
            peak_bytes=2**30,
            gemm_flops_per_second=1e9,
        )

    def theirs(case, folder, python):
        seen.append(("open_clip_train", case, folder))
        return TrainSpeed(samples_per_second=100.0, shares={"data": 0.2}, peak_bytes=2**30)

    monkeypatch.setattr(bench_train, "run_ours", ours)
    monkeypatch.setattr(bench_train, "run_open_clip", theirs)
    return seen


def options(shards, model, *more):
    return ["bench", "train", f"--shards={json.dumps(shards)}", f"--model={model}", *more]


def test_the_ratio_is_that_of_the_median_runs(pretended, shards, model, capsys):
    arguments = options(shards, model, "--open_clip_python=sh", "--json=true")
    assert main(arguments) == 0
    printed, said = capsys.readouterr()
    assert said.splitlines()[-1].endswith("W=1, round 3 of 3, ours: 200 samples/s")
    theirs, ours = json.loads(printed)
    assert (ours["least"], ours["samples_per_second"], ours["most"]) == (100, 200, 300)
    assert (ours["ratio"], theirs["ratio"]) == (2.0, 1.0)
    assert ours["mfu"] == pytest.approx(ours["step_flops"] * 200 / 64 / 1e9)
    assert sum(ours["shares"].values()) == pytest.approx(1)


def test_the_two_take_turns_in_empty_folders_of_their_own(pretended, shards, model):
    assert main(options(shards, model, "--open_clip_python=sh", "--device=cpu")) == 0
    names = [name for name, _, _ in pretended]
    assert names == ["open_clip_train", "ours"] * 3
    assert len({folder for _, _, folder in pretended}) == 6
    assert len({case for _, case, _ in pretended}) == 1


def test_the_cores_are_shared_out_unless_threads_are_given(pretended, shards, model):
    arguments = options(shards, model, "--rounds=1", "--world_sizes=[1,2]", "--threads=3")
    assert main(arguments) == 0
    assert [case.threads for _, case, _ in pretended] == [3, 3]


def test_the_table_has_a_line_for_each(pretended, shards, model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(options(shards, model, "--open_clip_python=sh")) == 0
    printed = capsys.readouterr().out
    for word in ("MFU", "optimizer", "open_clip_train", "60.0%", "1,024 MiB", "2.00"):
        assert word in printed


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--rounds=0", "rounds (0) must be at least 1"),
        ("--threads=0", "threads (0) must be at least 1"),
        ("--steps=15", "steps (15) must be a multiple of 10"),
        ("--warmup_steps=0", "warmup_steps (0) must be a multiple of 10"),
        ("--workers_per_rank=3", "shards (2) must be at least one for each of 3 loader processes"),
        (
            "--open_clip_python=no-such-python",
            "open_clip_python (no-such-python) must be a program",
        ),
        ("--precision=fp8", "fp8"),
    ],
)
def test_a_mistake_is_one_line(shards, model, option, message, capsys):
    assert main(options(shards, model, option)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_flops_of_a_step_are_those_of_its_matrices(model):
    built = build_dual_encoder(model)
    vision, text = (ARCHITECTURES["clip"][f"{tower}_cfg"] for tower in ("vision", "text"))
    width, tokens, embed = vision["width"], 17, ARCHITECTURES["clip"]["embed_dim"]

    def products(tokens, width):  # of a block: qkv, output, two of the MLP, and attention
        return 2 * tokens * 12 * width**2 + 4 * tokens**2 * width

    patches = 2 * 16 * width * 3 * 8 * 8
    image = products(tokens, width) + 2 * width * embed
    caption = products(text["context_length"], text["width"]) + 2 * text["width"] * embed
    # Backward does everything twice but the patches, whose pixels need no gradient.
    towers = 3 * (image + caption) + 2 * patches
    loss = 6 * 4 * 8 * embed
    found = step_flops(built, local_batch_size=4, global_batch_size=8)
    assert found == 4 * towers + loss


def test_products_are_measured_on_the_spot():
    assert gemm_rate(torch.device("cpu"), torch.float32, seconds=0.01) > 1e9
