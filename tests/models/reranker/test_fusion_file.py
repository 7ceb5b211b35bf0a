"""A head comes back as it was, and only for the towers it was trained on."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.reranker import (
    FusionConfig,
    FusionHead,
    encode_image_tokens,
    encode_text_tokens,
    read_head,
    token_shapes,
    write_head,
)
from tests.support.tiny_models import ARCHITECTURES, inputs_of, write_config


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    found = build_dual_encoder(write_config(path, ARCHITECTURES["clip"]))
    found.encoder.eval()
    return found


@pytest.fixture(scope="module")
def written(built, tmp_path_factory):
    """A head with weights of its own, and its file."""
    shapes = token_shapes(built)
    config = FusionConfig(direction="text_to_image", width=8, heads=2, layers=1)
    head = FusionHead(shapes["image"], shapes["text"], config).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("head") / "reranker.safetensors"
    write_head(path, head, built)
    return head, path


def test_a_head_that_was_written_judges_as_before(built, written):
    head, path = written
    images, texts = inputs_of(ARCHITECTURES["clip"])
    sides = encode_image_tokens(built.encoder, images), encode_text_tokens(built.encoder, texts)
    read = read_head(path, built)
    assert read.config == head.config
    assert not read.training
    assert torch.equal(read(*sides).logits, head(*sides).logits)


def test_the_towers_of_another_model_are_refused(built, written):
    other = moved(built)
    with pytest.raises(UserError, match=r"reads the tokens of another image tower; name the model"):
        read_head(written[1], other)


def moved(built):
    """The same model with one weight of the image tower moved."""
    encoder = copy.deepcopy(built.encoder)
    with torch.no_grad():
        encoder.clip.visual.proj.add_(0.1)
    return replace(built, encoder=encoder)


def test_a_file_that_is_no_head_is_refused(built, tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(UserError, match=r"other.safetensors\) cannot be read"):
        read_head(path, built)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"other.safetensors is no fusion head"):
        read_head(path, built)
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"cannot be read"):
        read_head(path, built)
