"""``export`` as a user calls it."""

import json
from dataclasses import replace
from functools import partial

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
from tests.support.exports import CAPTIONS, built_from, features_of
from tests.support.forked_runs import run_forked
from tests.support.run_folder import write_run
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


def test_the_card_alone_is_written_from_the_folder_of_a_run(tmp_path, monkeypatch, capsys):
    built = built_from(ARCHITECTURES["clip"], tmp_path)
    monkeypatch.setattr("dist_siglip.cli.run.export.load_trained", lambda **_: built)
    folder = write_run(tmp_path / "mine")
    out = tmp_path / "CARD.md"
    assert main(["export", f"--run_dir={folder}", f"--card={out}", "--license=mit"]) == 0
    _, head, text = out.read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["license"], head["library_name"]) == ("mit", "dist_siglip")
    assert head["model-index"][0]["name"] == "mine"
    for words in ("# mine", "## Data", "## Geometry", "## Limits", "`mit`"):
        assert words in text
    assert "## Use" not in text
    assert capsys.readouterr().out == f"wrote {out}\n"
    missing = tmp_path / "no" / "CARD.md"
    (tmp_path / "no").write_text("")
    assert main(["export", f"--run_dir={folder}", f"--card={missing}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_card_is_of_the_weights_that_are_exported(tmp_path, monkeypatch):
    built = built_from(ARCHITECTURES["clip"], tmp_path)
    folder, out = write_run(tmp_path / "mine"), tmp_path / "CARD.md"
    words = ["export", f"--run_dir={folder}", f"--card={out}"]
    for steps, more, measured in (
        (60, [], True),
        (40, [], False),
        (40, ["--ckpt_path=earlier.ckpt"], False),
        (None, ["--ckpt_path=an_average.safetensors"], False),
    ):
        given = partial(replace, built, trained_steps=steps)
        monkeypatch.setattr("dist_siglip.cli.run.export.load_trained", lambda g=given, **_: g())
        assert main([*words, *more]) == 0
        head = yaml.safe_load(out.read_text().split("---\n", 2)[1])
        assert ("model-index" in head) is measured
        assert ("Left out: what was measured of step 60" in out.read_text()) is not measured


def test_an_export_is_pushed_with_its_card_and_need_not_stay(tmp_path, monkeypatch, capsys):
    pushed = {}

    def push(folder, repository, **options):
        pushed.update({path.name: path.read_text("utf-8", "replace") for path in folder.iterdir()})
        pushed["to"] = (repository, options)
        return "https://hub/me/model/commit/1"

    monkeypatch.setattr("dist_siglip.cli.run.export.check_push", lambda *_: None)
    monkeypatch.setattr("dist_siglip.cli.run.export.push_folder", push)
    monkeypatch.chdir(tmp_path)
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    arguments = ["--to=safetensors", f"--model={model}", "--push=me/model", "--private"]
    assert main(["export", *arguments, "--revision=v2"]) == 0
    assert pushed["to"] == ("me/model", {"private": True, "revision": "v2"})
    assert {"README.md", "export.json", "open_clip_model.safetensors"} <= set(pushed)
    assert "license: other" in pushed["README.md"]
    assert 'build_dual_encoder("hf-hub:me/model")' in pushed["README.md"]
    assert str(tmp_path) not in pushed["README.md"]
    assert capsys.readouterr().out.endswith("pushed to https://hub/me/model/commit/1\n")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


@pytest.mark.e2e
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_recall_is_compared_on_the_pairs_of_the_run(precision, run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"--run_dir={run_dir}", "--to=onnx", f"--out={out}", f"--precision={precision}"]
    assert main(["export", *arguments, "--token_type=int32"]) == 0
    lowered = json.loads((out / "export.json").read_text())["lowered"]
    assert lowered["pairs"].startswith("20 pairs of ")
    assert set(lowered["metrics"]) == {
        f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)
    }
    for before, after in lowered["metrics"].values():
        assert 0 <= before <= 1
        assert abs(before - after) <= 0.2
    told = capsys.readouterr().out
    assert f"{precision}: cosine with fp32 at least" in told
    assert "image_to_text_recall@1" in told
    assert "| image_to_text_recall@1 |" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=open_clip", "--model=ViT-B-32"], "out (null)"),
        (["--out=x", "--model=ViT-B-32"], "to (null) must be open_clip, hf,"),
        (["--card=x", "--out=y", "--model=ViT-B-32"], "card (x) is written alone; leave out out:"),
        (["--card=x", "--to=hf", "--push=a/b", "--model=x"], "leave out to, push: an export"),
        (["--card=x", "--precision=int8", "--run_dir=x"], "leave out precision"),
        (["--card=x", "--token_type=int32", "--run_dir=x"], "leave out token_type"),
        (["--card=x", "--val_shards=y", "--run_dir=x"], "leave out val_shards"),
        (["--card=x", "--revision=y", "--run_dir=x"], "leave out revision"),
        (["--card=x", "--private", "--run_dir=x"], "leave out private"),
        (["--card=x", "--overwrite", "--run_dir=x"], "leave out overwrite"),
        (
            ["--to=onnx", "--out=x", "--run_dir=x", "--precision=int8", "--captions.members=[cap]"],
            "captions are of val_shards",
        ),
        (["--to=hf", "--out=x", "--model=ViT-B-32", "--private"], "are of push"),
        (["--to=hf", "--out=x", "--model=ViT-B-32", "--license=A B"], "license ('A B')"),
        (["--to=hf", "--out=x", "--run_dir=x", "--precision=int8"], "precision (int8) is of onnx"),
        (["--to=onnx", "--out=x", "--run_dir=x", "--val_shards=x"], "val_shards is compared on"),
        (["--to=hf", "--model=ViT-B-32", "--push=model"], "push (model) must be ORG/NAME"),
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
