"""Tokens come from the pass that makes the features, and end where the text ends."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dist_siglip.errors import UserError
from dist_siglip.models import DualEncoder, build_dual_encoder
from dist_siglip.models.reranker import encode_image_tokens, encode_text_tokens, token_shapes
from tests.support.tiny_models import ARCHITECTURES, inputs_of, network_of, write_config

# Tokens of the image tower, width of both towers.
SHAPES = {
    "clip": (16, 16, 16),
    "resnet": (4, 256, 16),
    "custom_text": (16, 16, 16),
    "siglip": (4, 64, 16),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_features_are_those_of_the_dual_encoder(kind):
    encoder = DualEncoder(network_of(ARCHITECTURES[kind])).eval()
    images, texts = inputs_of(ARCHITECTURES[kind])
    with torch.no_grad():
        found = encode_image_tokens(encoder, images), encode_text_tokens(encoder, texts)
        for ours, expected in zip(found, encoder(images, texts), strict=True):
            assert torch.allclose(ours.features, expected, atol=1e-6)
    num_tokens, image_width, text_width = SHAPES[kind]
    assert found[0].tokens.shape == (3, num_tokens, image_width)
    assert found[1].tokens.shape == (3, 8, text_width)
    assert found[0].is_token.all()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_shapes_are_known_before_any_data(kind, tmp_path, monkeypatch):
    built = build_dual_encoder(
        write_config(tmp_path / "tiny.json", ARCHITECTURES[kind]), check_tokenizer=False
    )
    length = ARCHITECTURES[kind]["text_cfg"]["context_length"]
    built = SimpleNamespace(
        encoder=built.encoder,
        image_size=built.image_size,
        patches=built.patches,
        tokenizer=lambda texts: torch.zeros(len(texts), length, dtype=torch.long),
    )
    built.encoder.train()
    num_tokens, image_width, text_width = SHAPES[kind]
    assert token_shapes(built) == {"image": (num_tokens, image_width), "text": (length, text_width)}
    assert built.encoder.training


def test_a_text_of_clip_ends_at_its_end_and_one_of_siglip_at_the_last_position():
    texts = torch.tensor([[49406, 5, 49407, 0, 0, 0, 0, 0], [49406, 5, 6, 7, 8, 9, 3, 49407]])
    encoder = DualEncoder(network_of(ARCHITECTURES["clip"]))
    assert encode_text_tokens(encoder, texts).is_token.sum(dim=1).tolist() == [3, 8]
    encoder = DualEncoder(network_of(ARCHITECTURES["siglip"]))
    assert encode_text_tokens(encoder, texts).is_token.all()


def test_padding_of_clip_does_not_reach_its_tokens():
    """Attention of the text tower is causal."""
    encoder = DualEncoder(network_of(ARCHITECTURES["clip"]))
    texts = torch.tensor([[49406, 5, 49407, 0, 0, 0, 0, 0]])
    others = torch.tensor([[49406, 5, 49407, 1, 2, 3, 4, 5]])
    first, second = encode_text_tokens(encoder, texts), encode_text_tokens(encoder, others)
    assert torch.allclose(first.tokens[first.is_token], second.tokens[first.is_token], atol=1e-6)
    assert not torch.allclose(first.tokens, second.tokens, atol=1e-6)


def test_a_tower_without_tokens_is_refused():
    encoder = DualEncoder(network_of(ARCHITECTURES["custom_text"]))
    encoder.clip.text = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"the text tower \(Linear\) gives no tokens before"):
        encode_text_tokens(encoder, torch.zeros(1, 8, dtype=torch.long))
    encoder = DualEncoder(network_of(ARCHITECTURES["siglip"]))
    encoder.clip.visual.trunk = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"the image tower \(Linear\) gives no tokens before"):
        encode_image_tokens(encoder, torch.zeros(1, 3, 32, 32))
