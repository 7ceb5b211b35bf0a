"""Folders of Siglip2Model in and out: features at six grids, processors, other libraries."""

import json
import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.naflexvit import naflexvit_base_patch16_siglip

from dist_siglip.data import ImageNormalizer, Preprocessing, evaluation_transform
from dist_siglip.data.samples.patches import patch_mask, unpack
from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.build import with_num_patches
from dist_siglip.models.interop.comparison import CAPTIONS as COMPARED
from dist_siglip.models.interop.export import export_model
from dist_siglip.models.naflex import NaFlexTower
from dist_siglip.models.reranker import token_shapes
from tests.support.exports import CAPTIONS, NEEDS_TRANSFORMERS_5, picture
from tests.support.hugging_face import write_folder
from tests.support.naflex import packed_of, write_models

transformers = pytest.importorskip("transformers")

TEXTS = ["five six", "twelve one two three", "ten"]


def write_published(folder, **said):
    """A folder as the published NaFlex models are laid out, and its model."""
    model = write_folder(folder, "siglip2")
    path = folder / "preprocessor_config.json"
    path.write_text(
        json.dumps(
            {
                "do_convert_rgb": None,
                "image_mean": [0.4, 0.5, 0.6],
                "image_processor_type": "Siglip2ImageProcessor",
                "image_std": [0.5, 0.4, 0.3],
                "max_num_patches": 64,
                "patch_size": 8,
                "processor_class": "Siglip2Processor",
                "resample": 2,
                **said,
            }
        )
    )
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    model = write_published(folder)
    built = build_dual_encoder(f"local-dir:{folder}")
    built.encoder.eval()
    return folder, model, built


@torch.no_grad()
def their_features(model, packed):
    patches, shapes = unpack(packed)
    found = model.get_image_features(
        pixel_values=patches, pixel_attention_mask=patch_mask(packed), spatial_shapes=shapes
    )
    return F.normalize(getattr(found, "pooler_output", found), dim=-1)


def test_a_published_folder_is_a_naflex_model_with_the_features_of_transformers(published):
    _, model, built = published
    assert isinstance(built.encoder.clip.visual, NaFlexTower)
    assert built.patches == (8, 64)
    assert built.image_size == 32  # of its 16 positions
    assert (built.mean, built.std) == ((0.4, 0.5, 0.6), (0.5, 0.4, 0.3))
    packed = packed_of()
    with torch.no_grad():
        found = built.encoder.encode_image(packed)
        texts = built.encoder.encode_text(built.tokenizer(TEXTS))
        tokens = model.get_text_features(input_ids=built.tokenizer(TEXTS))
    torch.testing.assert_close(found, their_features(model, packed), rtol=0, atol=1e-5)
    theirs = F.normalize(getattr(tokens, "pooler_output", tokens), dim=-1)
    torch.testing.assert_close(texts, theirs, rtol=0, atol=1e-5)
    assert (built.start_scale, built.start_bias) == (pytest.approx(math.exp(3)), -11.5)


def test_image_size_makes_it_one_of_pictures_of_that_size_and_num_patches_changes_its_budget(
    published,
):
    folder, model, _ = published
    square = build_dual_encoder(f"local-dir:{folder}", image_size=32)
    assert (square.patches, square.image_size) == (None, 32)
    images = torch.randn(2, 3, 32, 32)
    packed = packed_of([(4, 4)] * 2, 16)
    patches = images.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, -1)
    packed[:, 1:] = patches
    with torch.no_grad():
        found = square.encoder.eval().encode_image(images)
    torch.testing.assert_close(found, their_features(model, packed), rtol=0, atol=1e-5)
    other = build_dual_encoder(f"local-dir:{folder}", num_patches=100)
    assert other.patches == (8, 100)


def test_a_folder_that_says_nothing_of_patches_is_of_one_size_and_nonsense_is_refused(tmp_path):
    (tmp_path / "plain").mkdir()
    write_folder(tmp_path / "plain", "siglip2")
    assert build_dual_encoder(f"local-dir:{tmp_path / 'plain'}").patches is None
    (tmp_path / "broken").mkdir()
    write_published(tmp_path / "broken", max_num_patches="many")
    with pytest.raises(UserError, match=r"num_patches \(many\) must be a whole number") as caught:
        build_dual_encoder(f"local-dir:{tmp_path / 'broken'}")
    assert "\n" not in str(caught.value)


PICTURES = [picture(i, size) for i, size in enumerate([(70, 50), (33, 40), (40, 180), (31, 31)])]


def packed_pictures(built):
    inputs = Preprocessing.of(built)
    transform = evaluation_transform(inputs)
    packed = torch.stack([transform(image) for image in PICTURES])
    return ImageNormalizer(inputs.mean, inputs.std).pixels(packed)


@pytest.mark.e2e
@NEEDS_TRANSFORMERS_5
@pytest.mark.parametrize("source", ["published", "fixed"])
def test_what_transformers_reads_is_the_model_that_was_exported(
    source, published, tmp_path, caplog
):
    built = published[2]
    if source == "fixed":  # a tower of one size that became one of any
        built = build_dual_encoder(*write_models(tmp_path), num_patches=50)
        built = replace(built, mean=(0.4, 0.5, 0.6), std=(0.5, 0.4, 0.3))
        built.encoder.eval()
    done = export_model(built, tmp_path / "out", to="hf")
    assert done.largest_difference <= 1e-5
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(model).__name__ == "Siglip2Model"
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(
        text=CAPTIONS, images=PICTURES, padding="max_length", truncation=True, return_tensors="pt"
    )
    packed = packed_pictures(built)
    patches, shapes = unpack(packed)
    assert torch.equal(inputs.spatial_shapes, shapes)
    mask = patch_mask(packed)
    assert torch.equal(inputs.pixel_attention_mask.bool(), mask)
    # torchvision resizes in one rounding, Pillow in two.
    one = 1 / 255 / torch.tensor(built.std).repeat(64)
    assert ((inputs.pixel_values - patches).abs() <= one * 1.001)[mask].all()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens, own, theirs = (
        each(captions, **options).input_ids
        for each, captions in (
            (tokenizer, CAPTIONS),
            (tokenizer, list(COMPARED)),
            (processor.tokenizer, list(COMPARED)),
        )
    )
    assert torch.equal(tokens, built.tokenizer(CAPTIONS))
    is_told = "take transformers.PreTrainedTokenizerFast" in caplog.text
    assert is_told == (not torch.equal(own, theirs))
    inputs |= {"pixel_values": patches, "input_ids": tokens}
    with torch.no_grad():
        output = model(**inputs)
        features = built.encoder(packed, tokens)
    for theirs, ours in zip((output.image_embeds, output.text_embeds), features, strict=True):
        torch.testing.assert_close(F.normalize(theirs, dim=-1), ours, rtol=0, atol=1e-5)
    again = build_dual_encoder(f"local-dir:{tmp_path / 'out'}")
    assert again.patches == built.patches
    assert torch.equal(again.tokenizer(CAPTIONS), tokens)
    with torch.no_grad():
        found = again.encoder.eval().encode_image(packed)
    torch.testing.assert_close(found, features[0], rtol=0, atol=1e-6)
    assert "PreTrainedTokenizerFast" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.e2e
def test_an_export_for_this_package_says_its_budget(published, tmp_path):
    built = with_num_patches(published[2], 40)
    export_model(built, tmp_path / "out", to="safetensors")
    again = build_dual_encoder(f"local-dir:{tmp_path / 'out'}")
    assert again.patches == (8, 40)
    said = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (said["patch_size"], said["num_patches"]) == (8, 40)
    assert "at most 40 patches of 8 pixels" in (tmp_path / "out" / "README.md").read_text()
    packed = packed_of()
    with torch.no_grad():
        found = again.encoder.eval().encode_image(packed)
        assert torch.equal(found, built.encoder.encode_image(packed))


@pytest.mark.e2e
def test_onnxruntime_reads_pictures_of_any_shape_and_number_of_patches(published, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    built = published[2]
    assert export_model(built, tmp_path / "out", to="onnx").largest_difference <= 1e-5
    image = runtime.InferenceSession(tmp_path / "out" / "image.onnx")
    for packed in (packed_of(), packed_of([(2, 3)], 11)):
        patches, shapes = unpack(packed)
        (found,) = image.run(None, {"patches": patches.numpy(), "shapes": shapes.numpy()})
        with torch.no_grad():
            expected = built.encoder.encode_image(packed)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)
    said = json.loads((tmp_path / "out" / "dual_encoder.json").read_text())
    assert (said["patch_size"], said["num_patches"]) == (8, 64)


@pytest.mark.e2e
def test_open_clip_reads_a_tower_that_timm_has_a_name_for(published, tmp_path, monkeypatch):
    """Its pictures are encoded one by one there, each of its own shape."""
    built = published[2]
    with pytest.raises(UserError, match="no name stands for this one"):
        export_model(built, tmp_path / "none", to="open_clip")
    assert not (tmp_path / "none").exists()

    def small(pretrained=False, **options):
        sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2.5}
        grid = {"pos_embed_grid_size": (4, 4)}
        return naflexvit_base_patch16_siglip(pretrained, **{**sizes, **grid, **options})

    entrypoints = timm.models._registry._model_entrypoints
    monkeypatch.setitem(entrypoints, "naflexvit_small_siglip", small)
    done = export_model(built, tmp_path / "out", to="open_clip")
    assert done.largest_difference <= 1e-5
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    vision = config["model_cfg"]["vision_cfg"]
    assert vision["timm_model_name"] == "naflexvit_small_siglip"
    assert "width" not in vision


def test_a_reranker_refuses_pictures_of_any_shape(published):
    with pytest.raises(UserError, match="reads one number of patches from each picture") as caught:
        token_shapes(published[2])
    assert "\n" not in str(caught.value)
