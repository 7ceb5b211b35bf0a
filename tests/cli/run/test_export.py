"""``export`` as a user calls it."""

import json

import open_clip
import pytest
import torch
import yaml

from dist_siglip.cli import main
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.tuning import LoraSettings, add_adapters
from dist_siglip.runs import RunFolder
from dist_siglip.training.module.trained import load_trained
from tests.support.command import write_settings
from tests.support.exports import CAPTIONS, features_of
from tests.support.forked_runs import run_forked
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import weights_beside


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A short run with the other parameterisation of the bias."""
    folder = tmp_path_factory.mktemp("run")
    settings = write_settings(folder, max_steps=4, limit_val_batches=0)
    done = run_forked("fit", "--config", settings, "--model.logits.bias_parameterization=relative")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.e2e
@pytest.mark.parametrize("to", ["open_clip", "hf", "safetensors", "onnx"])
def test_a_run_is_exported_with_its_trained_scale_and_absolute_bias(to, run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", f"--run_dir={run_dir}", f"--to={to}", f"--out={out}"]) == 0
    assert "features differ by" in capsys.readouterr().out
    said = json.loads((out / "export.json").read_text())
    trained = load_trained(run_dir=str(run_dir))
    assert (said["logit_scale"], said["logit_bias"]) == (trained.start_scale, trained.start_bias)
    assert trained.start_bias not in (-10, 1)
    if to != "onnx":
        again = build_dual_encoder(f"local-dir:{out}")
        assert again.start_scale == pytest.approx(trained.start_scale, rel=1e-6)
        assert again.start_bias == pytest.approx(trained.start_bias, rel=1e-6)
        pixels = torch.randn(3, 3, 32, 32)
        for ours, theirs in zip(
            features_of(trained, pixels), features_of(again, pixels), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.e2e
def test_adapters_are_merged_into_what_open_clip_reads(tmp_path):
    pytest.importorskip("peft")
    settings = write_settings(tmp_path, max_steps=4, limit_val_batches=0)
    content = yaml.safe_load(settings.read_text())
    content["model"]["pretrained"] = weights_beside(content["model"]["model"])
    for tower in ("image", "text"):
        content["model"][f"{tower}_tower"] = {"lora": {"rank": 2}}
    settings.write_text(yaml.safe_dump(content))
    done = run_forked("fit", "--config", settings, "--model.optim.learning_rate=0.1")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert main(["export", f"--run_dir={tmp_path / 'run'}", "--to=open_clip", f"--out={out}"]) == 0

    live = build_dual_encoder(content["model"]["model"])
    for tower in ("image", "text"):
        add_adapters(live.encoder, tower, LoraSettings(rank=2))
    checkpoint = RunFolder(tmp_path / "run").newest_checkpoint()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    towers = {k.removeprefix("towers."): v for k, v in state.items() if k.startswith("towers.")}
    live.encoder.load_state_dict(towers)
    assert any(v.abs().max() > 0.01 for k, v in towers.items() if "lora_B" in k)

    network, _ = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    network.eval()
    pixels = torch.randn(3, 3, 32, 32)
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(CAPTIONS)
    with torch.no_grad():
        found = (network.encode_image(pixels, True), network.encode_text(tokens, True))
    for ours, theirs in zip(features_of(live, pixels), found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_model_by_name_is_written_with_what_was_said_of_it(tmp_path, capsys):
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    out = tmp_path / "out"
    arguments = ["export", "--to=safetensors", f"--out={out}", f"--model={model}"]
    assert main(arguments) == 0
    said = json.loads((out / "export.json").read_text())
    assert (said["to"], said["logit_scale"], said["logit_bias"]) == ("safetensors", 10, -10)
    assert said["largest_difference"] <= 1e-5
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=open_clip", "--model=ViT-B-32"], "out"),
        (["--to=coreml", "--out=x", "--model=ViT-B-32"], "to"),
        (["--to=safetensors", "--out=x"], "run_dir"),
        (["--to=safetensors", "--out=x", "--run_dir=nowhere"], "run_dir (nowhere)"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(arguments, message, capsys):
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
