"""``average`` as a user calls it: between a run and its start, and soups judged on pairs."""

import json

import pytest
import torch
import yaml

from dist_siglip.cli import main
from dist_siglip.models import build_dual_encoder
from dist_siglip.training.module.trained import load_trained
from tests.support.shards import write_shards
from tests.support.tiny_models import ARCHITECTURES, inputs_of, write_config
from tests.support.tuning_ranks import weights_beside
from tests.training.module.test_trained import run_of


@pytest.fixture
def run(tmp_path):
    """A run that started from weights, and these."""
    folder, _ = run_of(tmp_path, "clip")
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["model"]["pretrained"] = weights_beside(str(tmp_path / "tiny.json"))
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder, content["model"]["pretrained"]


def features(built):
    torch.manual_seed(3)  # the same inputs each time
    with torch.no_grad():
        return built.encoder.eval()(*inputs_of(ARCHITECTURES["clip"]))


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_between_a_run_and_its_start(run, tmp_path, capsys, alpha):
    folder, start = run
    out = tmp_path / "mixed.safetensors"
    assert main(["average", str(folder), f"--alpha={alpha}", f"--out={out}", "--json=true"]) == 0
    facts = json.loads(capsys.readouterr().out)
    config = str(tmp_path / "tiny.json")
    ends = [build_dual_encoder(config, start), load_trained(run_dir=str(folder))]
    mixed = build_dual_encoder(config, str(out))
    assert mixed.start_scale == pytest.approx(facts["logit_scale"])
    if alpha in (0, 1):
        for one, other in zip(features(mixed), features(ends[alpha]), strict=True):
            assert torch.equal(one, other)
        assert mixed.start_scale == pytest.approx(ends[alpha].start_scale, rel=1e-6)
        assert mixed.start_bias == pytest.approx(ends[alpha].start_bias, rel=1e-6)
        return
    states = [each.encoder.clip.state_dict() for each in (*ends, mixed)]
    for name, found in states[2].items():
        if found.is_floating_point():
            assert torch.allclose(found, (states[0][name] + states[1][name]) / 2, atol=1e-6), name


def test_soups_are_judged_on_pairs(run, tmp_path, capsys):
    folder, start = run
    shards = write_shards(tmp_path / "shards", (8, 8))
    words = ["average", str(folder), str(start), "--method=greedy", "--json=true"]
    words += [f"--shards={tmp_path / 'shards'}", "--workers=0", "--device=cpu"]
    assert shards
    out = tmp_path / "soup.safetensors"
    assert main([*words, f"--out={out}", "--refit_for=64"]) == 0
    facts = json.loads(capsys.readouterr().out)
    alone = {each["name"]: each["mean_recall@1"] for each in facts["tried"][:2]}
    assert set(alone) == {str(folder), str(start)}
    assert facts["kept"][0] == max(alone, key=lambda name: alone[name])
    assert len(facts["tried"]) == 3
    again = build_dual_encoder(str(tmp_path / "tiny.json"), str(out))
    assert again.start_scale == pytest.approx(facts["logit_scale"], rel=1e-6)
    # Of a loss the lowest is best, and it is shown as it is.
    out = tmp_path / "low.safetensors"
    assert main([*words, f"--out={out}", "--metric=loss"]) == 0
    facts = json.loads(capsys.readouterr().out)
    losses = {each["name"]: each["loss"] for each in facts["tried"][:2]}
    assert min(losses.values()) > 0
    assert facts["kept"][0] == min(losses, key=lambda name: losses[name])


def test_what_cannot_be_averaged_is_one_line(run, tmp_path, capsys):
    folder, start = run
    other = write_config(tmp_path / "other.json", ARCHITECTURES["siglip"])
    torch.manual_seed(0)
    torch.save(build_dual_encoder(other).encoder.clip.state_dict(), tmp_path / "other.pt")
    out = tmp_path / "out.safetensors"
    for words, named in (
        ([str(folder), str(tmp_path / "other.pt")], "do not fit the model"),
        ([str(start), str(tmp_path / "other.pt")], "of another architecture"),
        ([str(start), "--alpha=0.5"], "needs the folder of a run"),
        ([str(folder), "--alpha=1.5"], "alpha (1.5) must be in [0, 1]"),
        ([str(folder), str(start), str(start), "--alpha=0.5"], "leave it out for a soup"),
        ([str(folder), str(start), "--method=greedy"], "needs pairs to measure on"),
        ([str(tmp_path / "none.pt"), str(start)], "none.pt do not exist"),
    ):
        assert main(["average", *words, f"--out={out}"]) == 2, words
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert named in said, said
        assert not out.exists()
