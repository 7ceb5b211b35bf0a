"""``bench naflex``: what each sequence length costs, beside a tower of one size."""

import json

import pytest
import torch

from dist_siglip.bench.naflex import MIX, grid_of, mixed_pictures, padding_share
from dist_siglip.cli import main
from dist_siglip.data.samples.patches import mask_of, unpack
from tests.support.naflex import FIXED
from tests.support.tiny_models import ARCHITECTURES, write_config


def test_both_towers_are_measured_at_each_length(tmp_path, capsys):
    model = write_config(tmp_path / "m.json", FIXED)
    options = [f"--model={model}", "--lengths=[16,48]", "--local_batch_size=3", "--rounds=2"]
    assert main(["bench", "naflex", *options, "--device=cpu", "--json=true"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["patches"], row["tower"]) for row in rows] == [
        (length, tower) for length in (16, 48) for tower in ("NaFlex", "one size")
    ]
    for row in rows:
        assert min(row["images_per_second"], row["processor_seconds"], row["ratio"]) > 0
    flexible, fixed = rows[::2], rows[1::2]
    assert [row["ratio"] for row in fixed] == [1, 1]
    for pair in (flexible, fixed):
        assert pair[1]["peak_bytes"] > pair[0]["peak_bytes"]
    # Masks and positions of each picture take more, but not another set of activations.
    for ours, theirs in zip(flexible, fixed, strict=True):
        assert theirs["peak_bytes"] < ours["peak_bytes"] < 2 * theirs["peak_bytes"]
        assert ours["padding"] == padding_share(8, ours["patches"]) > 0 == theirs["padding"]


def test_the_small_tower_is_measured_and_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--lengths=[4]", "--local_batch_size=1", "--rounds=1", "--device=cpu"]
    assert main(["bench", "naflex", *options, "--precision=bf16-mixed"]) == 0
    printed = capsys.readouterr().out
    for word in ("image towers by sequence length on cpu, bf16-mixed", "one size", "NaFlex"):
        assert word in printed


def test_a_tower_that_cannot_keep_shapes_is_one_line(tmp_path, capsys):
    model = write_config(tmp_path / "m.json", ARCHITECTURES["clip"])
    assert main(["bench", "naflex", f"--model={model}", "--lengths=[4]"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "ViT of timm with attention pooling" in line


def test_pictures_have_the_shapes_of_the_mix_and_padding_is_what_they_leave():
    packed = mixed_pictures(len(MIX), 4, 64)
    patches, shapes = unpack(packed)
    mask = mask_of(shapes, patches.shape[1])
    assert patches.shape == (len(MIX), 64, 48)
    assert 1 - mask.float().mean().item() == pytest.approx(padding_share(4, 64))
    assert not patches[~mask].any()
    few = unpack(mixed_pictures(3, 4, 64))[1]
    assert len(torch.unique(few, dim=0)) == 3
    assert [grid_of(length) for length in (64, 128, 576, 7)] == [(8, 8), (8, 16), (24, 24), (1, 7)]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--lengths=[0]", "lengths[0] (0) must be in [1, 65535]"),
        ("--rounds=0", "rounds (0) must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_one_line(option, message, capsys):
    assert main(["bench", "naflex", option]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
