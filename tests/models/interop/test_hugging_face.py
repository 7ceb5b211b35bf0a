"""Folders of transformers give transformers' own features."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.interop.transformers_format import to_foreign_names
from tests.support.hugging_face import write_folder

pytest.importorskip("transformers")
CAPTIONS = ["five six", "twelve one two three", "ten"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    made = {}
    for kind in ("siglip", "siglip2", "clip"):
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = (folder, write_folder(folder, kind))
    return made


def pooled(output):
    return F.normalize(getattr(output, "pooler_output", output), dim=-1)


def patches_of(images, side):
    """Rows of a patch's pixels, colours last, as Siglip2Model takes them."""
    batch, _, height, width = images.shape
    cut = images.reshape(batch, 3, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * 3)


def their_features(kind, model, images, tokens):
    with torch.no_grad():
        if kind == "siglip2":
            patches = patches_of(images, 8)
            grid = images.shape[-1] // 8
            image = model.get_image_features(
                pixel_values=patches,
                pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int32),
                spatial_shapes=torch.tensor([[grid, grid]] * len(images)),
            )
        else:
            image = model.get_image_features(pixel_values=images)
        return pooled(image), pooled(model.get_text_features(input_ids=tokens))


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "clip"])
def test_features_tokens_and_start_values_are_those_of_transformers(kind, folders):
    from transformers import AutoModel, AutoTokenizer

    folder, _ = folders[kind]
    built = build_dual_encoder(f"local-dir:{folder}")
    tokens = AutoTokenizer.from_pretrained(folder)(
        CAPTIONS, padding="max_length", truncation=True, max_length=8, return_tensors="pt"
    ).input_ids
    images = torch.randn(3, 3, 32, 32)
    expected = their_features(kind, AutoModel.from_pretrained(folder).eval(), images, tokens)

    assert torch.equal(built.tokenizer(CAPTIONS), tokens)
    with torch.no_grad():
        found = built.encoder.eval()(images, tokens)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert built.start_scale == pytest.approx(math.exp(3.0))
    assert built.start_bias == (-10 if kind == "clip" else -11.5)
    assert built.mean == (0.4, 0.5, 0.6)
    assert built.interpolation == "bicubic"
    assert built.resize_mode == ("shortest" if kind == "clip" else "squash")


def test_naflex_positions_are_resampled_as_transformers_does(folders):
    folder, model = folders["siglip2"]
    built = build_dual_encoder(f"local-dir:{folder}", image_size=48)
    images, tokens = torch.randn(2, 3, 48, 48), torch.randint(3, 100, (2, 8))
    with torch.no_grad():
        found = built.encoder.eval().encode_image(images)
    torch.testing.assert_close(
        found, their_features("siglip2", model, images, tokens)[0], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_names_come_back_as_they_were(kind, folders):
    folder, model = folders[kind]
    built = build_dual_encoder(f"local-dir:{folder}")
    back = to_foreign_names(kind, built.encoder.clip.state_dict())
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("logit_")}
    assert back.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(back[name], value), name


def test_clip_pools_at_the_end_token_its_config_names(tmp_path):
    model = write_folder(tmp_path, "clip", end=5)
    built = build_dual_encoder(f"local-dir:{tmp_path}")
    tokens = torch.tensor([[1, 90, 40, 5, 0, 0, 0, 0], [1, 7, 8, 9, 99, 10, 5, 0]])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = built.encoder.eval().encode_text(tokens)
    expected = their_features("clip", model, images, tokens)[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_weights_in_several_files_are_read(folders, tmp_path):
    folder, model = folders["siglip"]
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert not (tmp_path / "model.safetensors").exists()
    whole, parts = (build_dual_encoder(f"local-dir:{f}") for f in (folder, tmp_path))
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(value, parts.encoder.state_dict()[name]), name
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"lists model-00002.* which is missing"):
        build_dual_encoder(f"local-dir:{tmp_path}")


class Payload:
    """Something whose pickle runs code."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (type(self.mark).touch, (self.mark,))


def test_a_pickle_with_code_is_refused_and_does_not_run(folders, tmp_path):
    folder, _ = folders["siglip"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save({"weight": Payload(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="could run code") as caught:
        build_dual_encoder(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blip"}, r"model_type \(blip\) of .* must be siglip, siglip2 or clip"),
        ({"vision_config": {"vision_use_head": False}}, "no pooling head"),
        ({"vision_config": {"hidden_act": "relu"}}, r"hidden_act \(relu\)"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "is of CLIP"),
        ({"text_config": {"projection_size": 3}}, "must be equal"),
    ],
)
def test_a_model_we_cannot_build_is_refused_in_one_line(change, message, folders, tmp_path):
    config = json.loads((folders["siglip"][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message) as caught:
        build_dual_encoder(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_wrong_files_are_refused_in_one_line(folders, tmp_path):
    folder, _ = folders["siglip"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="holds no tokenizer"):
        build_dual_encoder(f"local-dir:{tmp_path}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="holds no weights"):
        build_dual_encoder(f"local-dir:{tmp_path}")
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged"):
        build_dual_encoder(f"local-dir:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"1 of another shape \(text.token_embedding.weight"):
        build_dual_encoder(f"local-dir:{tmp_path}")
