"""``export`` as a user calls it."""

import json

import open_clip
import pytest
import torch

from dist_siglip.cli import main
from dist_siglip.module.trained import load_trained
from tests.support.command import run_command, write_settings
from tests.support.exports import CAPTIONS, features_of
from tests.support.tiny_models import ARCHITECTURES, write_config


@pytest.mark.slow
def test_what_a_run_trained_opens_in_open_clip(tmp_path, capsys):
    settings = write_settings(tmp_path, max_steps=4, limit_val_batches=0)
    done = run_command("fit", "--config", settings, "--model.logits.bias_parameterization=relative")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert main(["export", f"--run_dir={tmp_path / 'run'}", "--to=open_clip", f"--out={out}"]) == 0
    assert "features differ by" in capsys.readouterr().out

    trained = load_trained(run_dir=str(tmp_path / "run"))
    network, _ = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    network.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(CAPTIONS)
    pixels = torch.randn(3, 3, 32, 32)
    ours = features_of(trained, pixels)
    with torch.no_grad():
        found = (
            network.encode_image(pixels, normalize=True),
            network.encode_text(tokens, normalize=True),
        )
    for a, b in zip(ours, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert network.logit_scale.exp().item() == pytest.approx(trained.start_scale, rel=1e-6)
    assert network.logit_bias.item() == pytest.approx(trained.start_bias, rel=1e-6)
    assert network.logit_bias.item() != -10


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
