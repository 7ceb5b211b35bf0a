import copy
import json
import logging
import math
import pickle
import sys
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from tests.support.tiny_models import (
    ARCHITECTURES,
    RESNET,
    TEXT,
    VIT,
    inputs_of,
    network_of,
    write_config,
)

SCALE, BIAS = 23.5, -12.25


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request):
    return copy.deepcopy(ARCHITECTURES[request.param])


def our_features(built, images, texts):
    with torch.no_grad():
        return built.encoder.eval()(images, texts)


def assert_same_features(built, network, inputs):
    """Our features equal open_clip's own, normalised ones."""
    images, texts = inputs
    image_features, text_features = our_features(built, images, texts)
    with torch.no_grad():
        expected_image = network.encode_image(images, normalize=True)
        expected_text = network.encode_text(texts, normalize=True)
    torch.testing.assert_close(image_features, expected_image, rtol=0, atol=1e-6)
    torch.testing.assert_close(text_features, expected_text, rtol=0, atol=1e-6)


def set_scale_and_bias(network):
    network.logit_scale.data.fill_(math.log(SCALE))
    if network.logit_bias is not None:
        network.logit_bias.data.fill_(BIAS)


def save(network, path: Path) -> None:
    state = network.state_dict()
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("file_name", ["weights.pt", "weights.bin", "weights.safetensors"])
def test_weights_file_gives_the_features_of_open_clip(architecture, file_name, tmp_path):
    network = network_of(architecture)
    set_scale_and_bias(network)
    save(network, tmp_path / file_name)
    inputs = inputs_of(architecture)

    built = build_dual_encoder(
        write_config(tmp_path / "tiny.json", architecture), str(tmp_path / file_name)
    )

    assert_same_features(built, network, inputs)
    assert built.weights_loaded
    assert built.embed_dim == architecture["embed_dim"]
    assert built.start_scale == pytest.approx(SCALE, rel=1e-6)
    expected_bias = BIAS if network.logit_bias is not None else -10
    assert built.start_bias == expected_bias
    assert not [key for key in built.encoder.state_dict() if "logit_" in key]
    assert not [name for name, _ in built.encoder.named_parameters() if "logit_" in name]


def test_local_dir_gives_weights_preprocessing_and_start_values(architecture, tmp_path):
    network = network_of(architecture)
    set_scale_and_bias(network)
    save(network, tmp_path / "open_clip_model.safetensors")
    preprocessing = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.5, 0.25, 0.125],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    config = {"model_cfg": architecture, "preprocess_cfg": preprocessing}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    inputs = inputs_of(architecture)

    built = build_dual_encoder(f"local-dir:{tmp_path}")

    assert_same_features(built, network, inputs)
    assert built.start_scale == pytest.approx(SCALE, rel=1e-6)
    assert (built.mean, built.std) == ((0.5, 0.4, 0.3), (0.5, 0.25, 0.125))
    assert (built.interpolation, built.resize_mode) == ("bilinear", "squash")
    assert built.image_size == architecture["vision_cfg"]["image_size"]
    assert built.context_length == 8


def test_hub_folder_is_read_like_a_local_one(tmp_path, monkeypatch):
    network = network_of(ARCHITECTURES["custom_text"])
    save(network, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": ARCHITECTURES["custom_text"]})
    )

    def fetch(repository, filename="open_clip_model.safetensors"):
        assert repository == "someone/something"
        return str(tmp_path / filename)

    monkeypatch.setattr("dist_siglip.models.weight_source.download_pretrained_from_hf", fetch)
    built = build_dual_encoder("hf-hub:someone/something")

    inputs = inputs_of(ARCHITECTURES["custom_text"])
    assert_same_features(built, network, inputs)


def test_built_in_siglip_starts_at_ten_and_minus_ten():
    assert open_clip.get_model_config("ViT-B-16-SigLIP")["init_logit_bias"] == -10
    built = build_dual_encoder("ViT-B-16-SigLIP", image_size=32, check_tokenizer=False)

    assert (built.start_scale, built.start_bias) == (10.0, -10.0)
    assert not built.weights_loaded
    assert (built.image_size, built.context_length, built.embed_dim) == (32, 64, 768)
    # The preprocessing of the published SigLIP weights, not open_clip's default.
    assert built.mean == built.std == (0.5, 0.5, 0.5)
    assert built.resize_mode == "squash"


def test_json_config_starts_at_ten_and_minus_ten_whatever_it_says(tmp_path):
    architecture = {**ARCHITECTURES["clip"], "init_logit_scale": 1.0, "init_logit_bias": -1.0}
    built = build_dual_encoder(write_config(tmp_path / "tiny.json", architecture))

    assert (built.start_scale, built.start_bias) == (10.0, -10.0)


def test_clip_weights_keep_their_scale_and_warn_about_the_missing_bias(tmp_path, caplog):
    network = network_of(ARCHITECTURES["clip"])
    set_scale_and_bias(network)
    save(network, tmp_path / "clip.pt")

    built = build_dual_encoder(
        write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"]), str(tmp_path / "clip.pt")
    )

    assert built.start_scale == pytest.approx(SCALE, rel=1e-6)
    assert built.start_bias == -10.0
    assert "no logit bias" in caplog.text
    assert "calibrated" in caplog.text


def test_bias_of_zero_in_a_file_is_kept(tmp_path):
    network = network_of(ARCHITECTURES["siglip"])
    network.logit_bias.data.zero_()
    save(network, tmp_path / "siglip.pt")

    built = build_dual_encoder(
        write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"]), str(tmp_path / "siglip.pt")
    )

    assert built.start_bias == 0.0


def test_files_of_the_same_name_do_not_clash(tmp_path):
    widths = []
    for folder, embed_dim in (("a", 8), ("b", 12), ("a", 8)):
        (tmp_path / folder).mkdir(exist_ok=True)
        architecture = {**ARCHITECTURES["clip"], "embed_dim": embed_dim}
        built = build_dual_encoder(write_config(tmp_path / folder / "tiny.json", architecture))
        images, texts = inputs_of(architecture)
        widths.append(our_features(built, images, texts)[1].shape[1])

    assert widths == [8, 12, 8]
    assert "tiny" not in open_clip.list_models()


def test_name_of_the_file_does_not_choose_the_tokenizer(tmp_path):
    built = build_dual_encoder(write_config(tmp_path / "my-siglip.json", ARCHITECTURES["siglip"]))

    assert built.tokenizer(["seven"]).tolist()[0][:1] == [49406]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_image_size_and_context_length_are_resampled(kind, tmp_path, caplog):
    caplog.set_level("INFO")
    architecture = ARCHITECTURES[kind]
    save(network_of(architecture), tmp_path / "weights.pt")

    built = build_dual_encoder(
        write_config(tmp_path / "tiny.json", architecture),
        str(tmp_path / "weights.pt"),
        image_size=64,
        context_length=12,
    )

    images, texts = torch.randn(2, 3, 64, 64), torch.randint(1, 40000, (2, 12))
    image_features, text_features = our_features(built, images, texts)
    assert image_features.isfinite().all()
    assert text_features.isfinite().all()
    assert (built.image_size, built.context_length) == (64, 12)
    assert built.tokenizer(["one two"]).shape == (1, 12)
    assert caplog.text.count("resized ") == 2
    assert built.architecture["vision_cfg"]["image_size"] == 64


def test_resampled_timm_positions_equal_those_of_timm(tmp_path):
    architecture = ARCHITECTURES["siglip"]
    network = network_of(architecture)
    save(network, tmp_path / "weights.pt")
    network.visual.set_input_size(64)

    built = build_dual_encoder(
        write_config(tmp_path / "tiny.json", architecture),
        str(tmp_path / "weights.pt"),
        image_size=64,
    )

    torch.testing.assert_close(
        built.encoder.clip.visual.trunk.pos_embed, network.visual.trunk.pos_embed
    )


def test_rectangular_images_stay_rectangular(tmp_path):
    built = build_dual_encoder(
        write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"]), image_size=(16, 48)
    )
    features = built.encoder.encode_image(torch.randn(2, 3, 16, 48))

    assert built.image_size == (16, 48)
    assert features.shape == (2, 8)


def test_patch_dropout_acts_in_training_only(tmp_path):
    config = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    encoder = build_dual_encoder(config, patch_dropout=0.5).encoder
    images, _ = inputs_of(ARCHITECTURES["clip"])

    assert not torch.equal(encoder.encode_image(images), encoder.encode_image(images))
    encoder.eval()
    assert torch.equal(encoder.encode_image(images), encoder.encode_image(images))


def test_gradient_checkpointing_gives_the_same_gradients(architecture, tmp_path):
    config = write_config(tmp_path / "tiny.json", architecture)
    images, texts = inputs_of(architecture)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        encoder = build_dual_encoder(config, gradient_checkpointing=checkpointing).encoder
        image_features, text_features = encoder(images, texts)
        (image_features @ text_features.T).square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})

    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_every_parameter_gets_a_gradient(architecture, tmp_path):
    encoder = build_dual_encoder(write_config(tmp_path / "tiny.json", architecture)).encoder
    image_features, text_features = encoder(*inputs_of(architecture))
    (image_features * text_features).sum().backward()

    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_tokenizer_survives_pickling(tmp_path):
    built = build_dual_encoder(write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"]))
    content = pickle.dumps(built.tokenizer)

    assert len(content) < 1000
    captions = ["four thousand", "seven"]
    assert torch.equal(pickle.loads(content)(captions), built.tokenizer(captions))
    assert built.tokenizer(captions).dtype == torch.int64
    assert built.tokenizer(captions).shape == (2, 8)


def test_missing_transformers_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match=r"timm/ViT-B-16-SigLIP .*pip install \"dist-siglip\[hf\]\""
    ):
        build_dual_encoder("ViT-B-16-SigLIP", image_size=32)


def test_too_small_a_vocabulary_is_refused(tmp_path):
    architecture = {
        **ARCHITECTURES["clip"],
        "text_cfg": {**ARCHITECTURES["clip"]["text_cfg"], "vocab_size": 100},
    }
    with pytest.raises(UserError, match=r"vocab_size \(100\) .* at least 49408"):
        build_dual_encoder(write_config(tmp_path / "tiny.json", architecture))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multimodal_cfg": {}}, "captioning model"),
        ({"embeding": 3}, r"embeding is no setting of the config .* did you mean embed_dim"),
        ({"vision_cfg": {**VIT, "pach_size": 8}}, r"pach_size .* vision_cfg .* patch_size"),
        (
            {"vision_cfg": {"timm_model_name": "vit_tiny_patch61"}},
            r"timm_model_name .* vit_tiny_patch16",
        ),
        ({"vision_cfg": 3}, "vision_cfg of model .* must be an object, not 3"),
        ({"embed_dim": -8}, r"embed_dim \(-8\) of model .* must be a whole number from 1"),
        ({"embed_dim": 8.5}, r"embed_dim \(8.5\) of model .* must be a whole number"),
        ({"embed_dim": [8] * 400}, r"cannot be built from its config"),
        ({"vision_cfg": {**VIT, "patch_size": 0}}, r"patch_size \(0\) of model"),
        ({"vision_cfg": {**VIT, "layers": -1}}, r"layers \(-1\) of model"),
        ({"vision_cfg": {**VIT, "width": 10**30}}, r"width \(1000.*\) of model"),
        ({"vision_cfg": {**VIT, "head_width": 64}}, r"cannot be built from its config"),
        ({"vision_cfg": {**VIT, "image_size": 4}}, r"image_size \(4\) .* its patch of 8 pixels"),
        ({"vision_cfg": {**VIT, "mlp_ratio": -1.0}}, r"mlp_ratio \(-1.0\)"),
        ({"vision_cfg": {**RESNET, "image_size": 16}}, "its patch of 32 pixels"),
        ({"text_cfg": {**TEXT, "heads": 0}}, r"heads \(0\) of model"),
        ({"text_cfg": {"width": 10, "heads": 3}}, r"cannot be built from its config \(embed_dim"),
        ({"text_cfg": {"tokenizer_kwargs": {"clena": 1}}}, r"tokenizer_kwargs .* are wrong"),
    ],
)
def test_wrong_config_is_refused_in_one_line(change, message, tmp_path):
    config = write_config(tmp_path / "tiny.json", {**ARCHITECTURES["clip"], **change})
    with pytest.raises(UserError, match=message) as caught:
        build_dual_encoder(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"image_size \(0\)"),
        ({"image_size": 1}, r"image_size \(1\) .* at least its patch of 8 pixels"),
        ({"context_length": 1}, r"context_length \(1\)"),
        ({"patch_dropout": 1.0}, r"patch_dropout \(1.0\) must be in \[0, 1\)"),
    ],
)
def test_wrong_option_is_refused(options, message, tmp_path):
    config = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    with pytest.raises(UserError, match=message):
        build_dual_encoder(config, **options)


def test_patch_dropout_of_a_resnet_is_refused(tmp_path):
    config = write_config(tmp_path / "tiny.json", ARCHITECTURES["resnet"])
    with pytest.raises(UserError, match="needs a ViT"):
        build_dual_encoder(config, patch_dropout=0.5)


def test_building_leaves_the_root_logger_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    build_dual_encoder(write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"]))
    assert logging.getLogger().handlers == []


@pytest.mark.parametrize("hugging_face", ["someone/tokenizer", None])
def test_config_cannot_allow_foreign_code(hugging_face, tmp_path):
    text = {
        **ARCHITECTURES["clip"]["text_cfg"],
        "hf_tokenizer_name": hugging_face,
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    config = write_config(tmp_path / "tiny.json", {**ARCHITECTURES["clip"], "text_cfg": text})
    with pytest.raises(UserError, match="trust_remote_code"):
        build_dual_encoder(config)
