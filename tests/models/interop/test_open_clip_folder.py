"""What open_clip reads is the model that was exported."""

import json

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.architecture import instantiate
from dist_siglip.models.interop.export import export_model
from dist_siglip.models.interop.to_open_clip import name_of_tower
from tests.support.exports import (
    BIAS,
    CAPTIONS,
    NATIVE,
    SCALE,
    built_from,
    features_of,
    picture,
    pixels_of,
    prepared,
)
from tests.support.hugging_face import write_folder
from tests.support.tiny_models import ARCHITECTURES

pytestmark = pytest.mark.e2e


def open_with_open_clip(folder):
    network, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return network.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.mark.parametrize("kind", list(NATIVE))
def test_open_clip_reads_equal_features_tokens_pixels_scale_and_bias(kind, tmp_path):
    built = built_from(NATIVE[kind], tmp_path)
    export_model(built, tmp_path / "out", to="open_clip")
    network, transform, tokenizer = open_with_open_clip(tmp_path / "out")

    assert torch.equal(tokenizer(CAPTIONS), built.tokenizer(CAPTIONS))
    pixels = pixels_of(built, picture())
    torch.testing.assert_close(transform(picture())[None], pixels, rtol=0, atol=1e-6)
    with torch.no_grad():
        found = (
            network.encode_image(pixels, normalize=True),
            network.encode_text(tokenizer(CAPTIONS), normalize=True),
        )
    for theirs, ours in zip(found, features_of(built, pixels), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert network.logit_scale.exp().item() == pytest.approx(SCALE, rel=1e-6)
    assert network.logit_bias.item() == BIAS


@pytest.mark.parametrize("to", ["open_clip", "safetensors"])
@pytest.mark.parametrize("kind", list(NATIVE))
def test_our_own_reader_takes_it_back(kind, to, tmp_path):
    built = built_from(NATIVE[kind], tmp_path)
    export_model(built, tmp_path / "out", to=to)
    again = build_dual_encoder(f"local-dir:{tmp_path / 'out'}")
    for name, value in built.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[name], value), name
    assert (again.start_scale, again.start_bias) == (pytest.approx(SCALE, rel=1e-6), BIAS)
    for fact in ("image_size", "mean", "std", "interpolation", "resize_mode", "context_length"):
        assert getattr(again, fact) == getattr(built, fact), fact
    assert torch.equal(again.tokenizer(CAPTIONS), built.tokenizer(CAPTIONS))


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "clip"])
def test_a_model_from_transformers_keeps_its_tokenizer(kind, tmp_path):
    pytest.importorskip("transformers")
    write_folder(tmp_path, kind)
    built = prepared(build_dual_encoder(f"local-dir:{tmp_path}"))
    to = "open_clip" if kind == "clip" else "safetensors"
    export_model(built, tmp_path / "out", to=to)
    again = build_dual_encoder(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(again.tokenizer(CAPTIONS), built.tokenizer(CAPTIONS))
    pixels = pixels_of(built, picture())
    for ours, theirs in zip(features_of(built, pixels), features_of(again, pixels), strict=True):
        assert torch.equal(ours, theirs)
    if kind == "clip":
        tokenizer = open_with_open_clip(tmp_path / "out")[2]
        assert torch.equal(tokenizer(CAPTIONS), built.tokenizer(CAPTIONS))


def test_the_config_names_no_path_and_nothing_of_training(tmp_path):
    pytest.importorskip("transformers")
    write_folder(tmp_path, "clip")
    built = build_dual_encoder(f"local-dir:{tmp_path}", patch_dropout=0.5)
    export_model(built, tmp_path / "out", to="open_clip")
    for path in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert "patch_dropout" not in config["model_cfg"]["vision_cfg"]


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_tower_without_a_name_in_timm_is_refused_and_nothing_is_left(kind, tmp_path):
    pytest.importorskip("transformers")
    write_folder(tmp_path, kind)
    built = build_dual_encoder(f"local-dir:{tmp_path}")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"vit_base_patch16_siglip_224 at 32 pixels.* use hf") as e:
        export_model(built, tmp_path / "out", to="open_clip")
    assert "\n" not in str(e.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_timm_tower_at_another_size_is_refused(tmp_path):
    built = built_from(ARCHITECTURES["siglip"], tmp_path)
    with pytest.raises(UserError, match="test_vit at 32 pixels"):
        export_model(built, tmp_path / "out", to="open_clip")


@pytest.mark.parametrize(
    ("size", "patch", "activation", "expected"),
    [
        (224, 16, "none", "vit_base_patch16_siglip_224"),
        (384, 16, "none", "vit_base_patch16_siglip_384"),
        (256, 32, "tanh", "vit_base_patch32_siglip_256"),
        (224, 16, "tanh", None),
        (240, 16, "none", None),
    ],
)
def test_a_tower_with_stated_sizes_has_a_name_if_timm_has_the_very_same(
    size, patch, activation, expected
):
    """As a folder of transformers states them."""
    vision = {
        "image_size": size,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "none",
        "patch_size": patch,
        "width": 768,
        "layers": 12,
        "head_width": 64,
        "mlp_ratio": 4.0,
        "act_kwargs": {"approximate": activation},
    }
    architecture = {**ARCHITECTURES["siglip"], "embed_dim": 768, "vision_cfg": vision}
    with torch.device("meta"):
        network = instantiate(architecture, name="stated")
    assert isinstance(network.visual, TimmModel)
    assert name_of_tower(network.visual, 768, vision) == expected
