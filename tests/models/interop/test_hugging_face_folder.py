"""What transformers reads is the model that was exported."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.interop.export import export_model
from tests.support.exports import (
    BIAS,
    CAPTIONS,
    NATIVE,
    NEEDS_TRANSFORMERS_5,
    SCALE,
    built_from,
    features_of,
    picture,
    pixels_of,
    prepared,
)
from tests.support.hugging_face import write_folder
from tests.support.tiny_models import ARCHITECTURES, TEXT, VIT

pytestmark = pytest.mark.e2e

transformers = pytest.importorskip("transformers")

SIGLIP_TOWER = {
    "image_size": 32,
    "timm_model_name": "vit_base_patch16_siglip_224",
    "timm_pool": "map",
    "timm_proj": "none",
    "patch_size": 8,
    "width": 64,
    "layers": 2,
    "head_width": 32,
    "mlp_ratio": 2.5,
}
MODELS = {
    "clip": {**ARCHITECTURES["clip"], "quick_gelu": True},
    "custom_text": ARCHITECTURES["custom_text"],
    # Exact GELU in one tower, its approximation in the other, as in SigLIP 2 of open_clip.
    "siglip2": {
        **ARCHITECTURES["siglip"],
        "vision_cfg": {**SIGLIP_TOWER, "act_kwargs": {"approximate": "tanh"}},
        "text_cfg": {
            **ARCHITECTURES["siglip"]["text_cfg"],
            "norm_kwargs": {"eps": 1e-6},
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    },
}
PICTURES = [picture(i, size) for i, size in enumerate([(70, 50), (33, 40), (90, 180)])]
MORE_CAPTIONS = [
    *CAPTIONS,
    "",
    "one!! ! it\u2019s \u201ctwo\u201d DON'T café 😀 <|endoftext|>",
    "\tthree \n four",
]


def of_5(*values):
    return pytest.param(*values, marks=NEEDS_TRANSFORMERS_5)


@pytest.fixture(
    scope="module",
    params=["siglip", "siglip-naflex", of_5("clip-hf"), "clip", "custom_text", of_5("siglip2")],
)
def pair(request, tmp_path_factory):
    """A model, from transformers with its tokenizer or of open_clip's own, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in MODELS:
        built = built_from(MODELS[request.param], folder)
    else:
        kind = {"siglip-naflex": "siglip2", "clip-hf": "clip"}.get(request.param, "siglip")
        write_folder(folder, kind)
        built = prepared(build_dual_encoder(f"local-dir:{folder}"))
    export_model(built, folder / "out", to="hf")
    return built, folder / "out"


def is_clip(model):
    return type(model).__name__ == "CLIPModel"


def test_features_tokens_pixels_scale_and_bias_are_equal(pair):
    built, exported = pair
    model = transformers.AutoModel.from_pretrained(exported).eval()
    processor = transformers.AutoProcessor.from_pretrained(exported, backend="pil")
    inputs = processor(
        text=MORE_CAPTIONS,
        images=PICTURES,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    assert torch.equal(inputs.input_ids, built.tokenizer(MORE_CAPTIONS))
    pixels = torch.cat([pixels_of(built, image) for image in PICTURES])
    torch.testing.assert_close(inputs.pixel_values, pixels, rtol=0, atol=1e-6)
    with torch.no_grad():
        output = model(**inputs)
    found = (output.image_embeds, output.text_embeds)
    for theirs, ours in zip(found, features_of(built, pixels, MORE_CAPTIONS), strict=True):
        torch.testing.assert_close(F.normalize(theirs, dim=-1), ours, rtol=0, atol=1e-5)
    assert model.logit_scale.exp().item() == pytest.approx(SCALE, rel=1e-6)
    bias = model.config.logit_bias if is_clip(model) else model.logit_bias.item()
    assert bias == BIAS
    cosines = output.image_embeds @ output.text_embeds.T
    expected = SCALE * cosines + (0 if is_clip(model) else BIAS)
    torch.testing.assert_close(output.logits_per_image, expected, rtol=1e-5, atol=1e-4)


def test_the_default_processor_is_off_by_at_most_one_of_255(pair):
    """It resizes with torchvision, which rounds otherwise than PIL."""
    built, exported = pair
    processor = transformers.AutoProcessor.from_pretrained(exported)
    found = processor(images=picture(), return_tensors="pt").pixel_values
    one = 1 / 255 / torch.tensor(built.std).reshape(1, 3, 1, 1)
    assert ((found - pixels_of(built, picture())).abs() <= one * 1.001).all()


def test_a_crop_with_an_odd_margin_is_one_pixel_off(tmp_path):
    """71 rows, 32 wanted: the middle begins at row 20 to torchvision, at row 19 to transformers."""
    built = built_from(MODELS["clip"], tmp_path)
    export_model(built, tmp_path / "out", to="hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    image = picture(size=(90, 200))
    found = processor(images=image, return_tensors="pt").pixel_values
    ours = pixels_of(built, image)
    torch.testing.assert_close(found[:, :, 1:], ours[:, :, :-1], rtol=0, atol=1e-6)


def test_our_own_reader_takes_it_back(pair):
    built, exported = pair
    again = build_dual_encoder(f"local-dir:{exported}")
    pixels = pixels_of(built, picture())
    for ours, theirs in zip(features_of(built, pixels), features_of(again, pixels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (again.start_scale, again.start_bias) == (pytest.approx(SCALE, rel=1e-6), BIAS)
    for fact in ("image_size", "mean", "std", "interpolation", "resize_mode", "context_length"):
        assert getattr(again, fact) == getattr(built, fact), fact
    assert torch.equal(again.tokenizer(MORE_CAPTIONS), built.tokenizer(MORE_CAPTIONS))


def test_no_file_names_a_path_of_this_machine(pair):
    folder = pair[1]
    for path in folder.glob("*.json"):
        assert str(folder.parent) not in path.read_text(), path.name


def test_the_tokenizer_of_clip_is_there_under_its_own_class(tmp_path):
    built = built_from(MODELS["clip"], tmp_path)
    export_model(built, tmp_path / "out", to="hf")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(tokens.input_ids, built.tokenizer(CAPTIONS))
    assert (tmp_path / "out" / "merges.txt").exists()


def test_an_export_of_an_export_has_the_same_files(tmp_path):
    (tmp_path / "source").mkdir()
    write_folder(tmp_path / "source", "siglip")
    built = build_dual_encoder(f"local-dir:{tmp_path / 'source'}")
    export_model(built, tmp_path / "one", to="hf")
    export_model(build_dual_encoder(f"local-dir:{tmp_path / 'one'}"), tmp_path / "two", to="hf")
    for path in (tmp_path / "one").iterdir():
        if path.name != "export.json":
            assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("clip", "squash"),
        ("clip", "shortest"),
        ("siglip2", "squash"),
        of_5("siglip2", "shortest"),
    ],
)
def test_either_family_may_squash_or_crop(kind, mode, tmp_path):
    built = replace(built_from(MODELS[kind], tmp_path), resize_mode=mode, interpolation="bilinear")
    export_model(built, tmp_path / "out", to="hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    found = processor(images=picture(), return_tensors="pt").pixel_values
    torch.testing.assert_close(found, pixels_of(built, picture()), rtol=0, atol=1e-6)
    again = build_dual_encoder(f"local-dir:{tmp_path / 'out'}")
    assert (again.resize_mode, again.interpolation) == (mode, "bilinear")


@NEEDS_TRANSFORMERS_5
def test_clip_pools_at_the_end_token_its_config_names(tmp_path):
    write_folder(tmp_path, "clip", end=5)
    built = prepared(build_dual_encoder(f"local-dir:{tmp_path}"))
    export_model(built, tmp_path / "out", to="hf")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[1, 90, 40, 5, 0, 0, 0, 0], [1, 7, 8, 9, 99, 10, 5, 0]])
    with torch.no_grad():
        found = model(pixel_values=torch.randn(2, 3, 32, 32), input_ids=tokens).text_embeds
        ours = built.encoder.encode_text(tokens)
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)


def changed(architecture, section, **values):
    result = copy.deepcopy(architecture)
    result[section] |= values
    return result


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (NATIVE["resnet"], "no class for an image tower ModifiedResNet"),
        (NATIVE["siglip"], "no counterpart for visual.trunk.cls_token"),
        (changed(MODELS["clip"], "vision_cfg", pool_type="avg"), "image pooling avg"),
        (changed(MODELS["clip"], "vision_cfg", attentional_pool=True), "no counterpart for"),
        (changed(MODELS["clip"], "vision_cfg", ls_init_value=0.1), "no counterpart for"),
        (changed(MODELS["clip"], "text_cfg", no_causal_mask=True), "without causal mask"),
        (changed(MODELS["clip"], "text_cfg", pool_type="first"), "text pooling first"),
        (changed(MODELS["siglip2"], "text_cfg", no_causal_mask=False), "has a causal mask"),
        (changed(MODELS["clip"], "vision_cfg", image_size=[32, 64]), "square pictures only"),
        (
            changed(MODELS["clip"], "text_cfg", tokenizer_kwargs={"reduction_mask": "simple"}),
            r"reduction_mask \(simple\)",
        ),
    ],
)
def test_what_transformers_cannot_express_is_refused_in_one_line(architecture, message, tmp_path):
    built = built_from(architecture, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        export_model(built, tmp_path / "out", to="hf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_padding_of_the_longest_side_is_refused(tmp_path):
    built = replace(built_from(MODELS["clip"], tmp_path), resize_mode="longest")
    with pytest.raises(UserError, match=r"resize_mode \(longest\)"):
        export_model(built, tmp_path / "out", to="hf")


def test_the_configuration_says_what_the_towers_are(tmp_path):
    built = built_from(MODELS["siglip2"], tmp_path)
    export_model(built, tmp_path / "out", to="hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["hidden_act"] == "gelu_pytorch_tanh"
    assert config["text_config"]["hidden_act"] == "gelu"
    assert config["vision_config"]["intermediate_size"] == 160
    assert config["text_config"]["projection_size"] == 64
    assert config["text_config"]["hidden_size"] == TEXT["width"]
    assert config["vision_config"]["patch_size"] == VIT["patch_size"]
