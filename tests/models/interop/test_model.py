"""What is wrong in an export is noticed before anyone sees it."""

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models.interop import to_open_clip as open_clip_folder
from dist_siglip.models.interop.export import export_model
from tests.support.exports import built_from
from tests.support.tiny_models import ARCHITECTURES


@pytest.fixture
def built(tmp_path):
    return built_from(ARCHITECTURES["clip"], tmp_path)


@pytest.mark.parametrize("change", [0.01, float("nan")])
@pytest.mark.parametrize("name", ["visual.proj", "text_projection"])
def test_other_features_are_an_error_and_leave_no_folder(
    name, change, built, tmp_path, monkeypatch
):
    true = open_clip_folder._tensors

    def wrong(model):
        tensors = true(model)
        tensors[name][0, 0] += change
        return tensors

    monkeypatch.setattr(open_clip_folder, "_tensors", wrong)
    with pytest.raises(UserError, match=r"to \(open_clip\) gives features that differ by"):
        export_model(built, tmp_path / "out", to="open_clip")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_other_tokens_are_an_error(built, tmp_path, monkeypatch):
    built.architecture["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    with pytest.raises(UserError, match="features that differ"):
        export_model(built, tmp_path / "out", to="open_clip")


def test_a_model_that_diverged_is_refused(built, tmp_path):
    with torch.no_grad():
        built.encoder.clip.visual.proj[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"the model: visual\.proj is not finite in 1 of 128"):
        export_model(built, tmp_path / "out", to="safetensors")


def test_the_model_is_left_as_it_was(built, tmp_path):
    built.encoder.train()
    before = {name: value.clone() for name, value in built.encoder.state_dict().items()}
    export_model(built, tmp_path / "out", to="open_clip")
    assert built.encoder.training
    for name, value in built.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
