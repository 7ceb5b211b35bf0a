"""``bench`` names its subcommands; ``bench loss`` measures every baseline on the same features."""

import json
import re

import pytest
import torch

from dist_siglip.bench.loss import baselines
from dist_siglip.cli import main

SMALL = ["--local_batch_size=96", "--embed_dim=16", "--rounds=1", "--device=cpu"]


def rows_of(capsys, *options):
    assert main(["bench", "loss", *SMALL, *options, "--json=true"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_process(dtype, capsys):
    rows = {row["contestant"]: row for row in rows_of(capsys, f"--dtypes=[{dtype}]")}
    losses = {name for name in rows if not name.startswith("three matmuls")}
    assert losses == {"dist_siglip auto", "open_clip bidir", "plain chunks"}
    assert rows["open_clip bidir"]["ratio"] == 1.0
    products = [row for name, row in rows.items() if name not in losses]
    assert max(row["matmul_share"] for row in products) == 1.0
    for name in losses:
        row = rows[name]
        assert (row["world_size"], row["local_batch_size"], row["embed_dim"]) == (1, 96, 16)
        assert row["dtype"] == dtype
        assert row["milliseconds"] > 0
        # At least the gradients of the features, and a logit for every pair of a tile.
        assert row["peak_bytes"] > 2 * 96 * 16 * 2 + 96 * 96 * 2
        expected = rows["open_clip bidir"]["loss"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 2e-2)


def test_every_kernel_of_the_machine_has_a_row(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # not its speed
    rows = {row["contestant"]: row["loss"] for row in rows_of(capsys, "--kernel=all")}
    assert rows["dist_siglip auto, eager"] == pytest.approx(rows["open_clip bidir"], rel=1e-5)
    assert rows["dist_siglip auto, compiled"] == pytest.approx(rows["open_clip bidir"], rel=1e-5)


def test_a_kernel_that_cannot_be_had_is_told(capsys):
    assert main(["bench", "loss", *SMALL, "--kernel=triton"]) == 2
    assert "kernel ('triton') cannot be used: the features are on a cpu" in capsys.readouterr().err


@pytest.mark.e2e
def test_two_processes_with_every_exchange_named(capsys):
    rows = rows_of(capsys, "--world_sizes=[2]", "--exchanges=[ring,all_gather]")
    names = [row["contestant"] for row in rows if row["peak_bytes"] is not None]
    assert names == [
        "dist_siglip ring",
        "dist_siglip all_gather",
        "open_clip bidir",
        "open_clip gather",
        "plain chunks",
    ]
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)


def test_the_table_has_a_line_for_each_baseline(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["bench", "loss", *SMALL]) == 0
    printed = capsys.readouterr().out
    for word in ("ratio", "of matmul", "three matmuls", "dist_siglip auto", "plain chunks", "MiB"):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["losses"],
            r"bench \(losses\) must be one of loss, data, train, naflex, checkpoint, plan, sim",
        ),
        (["loss", "--rounds=0"], r"rounds \(0\) must be at least 1"),
        (["loss", "--world_sizes=[0]"], r"world_sizes\[0\] \(0\) must be at least 1"),
        (["loss", "--pairs=2"], "pairs"),
        (["loss", "--exchanges=[rings]"], "rings"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_help_lists_the_subcommands(capsys):
    assert main(["bench", "--help"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:9]] == [
        "loss",
        "data",
        "train",
        "naflex",
        "checkpoint",
        "plan",
        "simulate",
    ]
    assert main(["bench"]) == 2


def test_the_peer_for_gpus_is_left_out_on_a_cpu():
    assert "siglip-kernel" not in baselines(0, 1, torch.device("cpu"), ("auto",))
