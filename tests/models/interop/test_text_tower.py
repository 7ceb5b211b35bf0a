"""A text tower of Hugging Face leaves this package and comes back, without its old folder."""

import json
import shutil

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.build import tower_fingerprint
from dist_siglip.models.interop.export import export_model
from tests.support.exports import features_of, prepared
from tests.support.text_towers import write_architecture, write_bert

pytest.importorskip("transformers")


@pytest.fixture
def built(tmp_path):
    bert = write_bert(tmp_path / "bert")
    return prepared(build_dual_encoder(write_architecture(tmp_path / "a.json", bert)))


@pytest.mark.parametrize("to", ["open_clip", "safetensors"])
def test_it_comes_back_with_the_same_features_from_anywhere(built, tmp_path, to):
    assert export_model(built, tmp_path / "out", to=to).largest_difference <= 1e-6
    pixels = torch.randn(2, 3, 32, 32)
    expected = features_of(built, pixels)
    digest = tower_fingerprint(built, "text")
    shutil.rmtree(tmp_path / "bert")
    (tmp_path / "out").rename(tmp_path / "moved")
    back = build_dual_encoder(f"local-dir:{tmp_path / 'moved'}")
    assert back.weights_loaded
    for mine, theirs in zip(features_of(back, pixels), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert tower_fingerprint(back, "text") == digest


def test_open_clip_reads_it_where_it_was_written(built, tmp_path, monkeypatch):
    import open_clip

    monkeypatch.chdir(tmp_path)
    export_model(built, tmp_path / "out", to="open_clip")
    shutil.rmtree(tmp_path / "bert")
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["hf_model_name"] == str(tmp_path / "out")
    theirs = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")[0].eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a red fox"])
    with torch.no_grad():
        features = theirs.encode_text(tokens, normalize=True)
        torch.testing.assert_close(
            features, built.encoder.eval().encode_text(built.tokenizer(["a red fox"]))
        )


def test_transformers_has_no_class_for_it(built, tmp_path):
    with pytest.raises(UserError, match=r"to \(hf\): transformers has no class for a text tower"):
        export_model(built, tmp_path / "out", to="hf")


@pytest.mark.e2e
def test_onnx_has_its_features(built, tmp_path):
    pytest.importorskip("onnxruntime")
    assert export_model(built, tmp_path / "out", to="onnx").largest_difference <= 1e-5
