"""Models to export, and what goes in and comes out of them."""

import copy
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from PIL import Image

from dist_siglip.data import ImageNormalizer, Preprocessing, evaluation_transform
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.text_tower import ModelTokenizer
from tests.support.tiny_models import ARCHITECTURES, write_config

# A SigLIP that crops, and a CLIPModel with another tokenizer than CLIP's: docs/export.md.
NEEDS_TRANSFORMERS_5 = pytest.mark.skipif(
    version("transformers").startswith("4."), reason="transformers 4 does not open it"
)
CAPTIONS = ["A red car, parked (in 1987)!", "two_dogs on  a beach", " ".join(["word"] * 100)]
SCALE, BIAS = 23.5, -12.25
# As ARCHITECTURES, with the timm tower at its own size: open_clip builds it at no other.
NATIVE = copy.deepcopy(ARCHITECTURES)
NATIVE["siglip"]["vision_cfg"]["image_size"] = 160


def built_from(architecture, folder, *, random=True):
    """A model with random weights, a trained scale and a trained bias."""
    built = build_dual_encoder(write_config(folder / "tiny.json", architecture))
    return prepared(built, random=random)


def prepared(built, *, random=True):
    """The same with weights that leave no two rows of features alike, and preprocessing."""
    torch.manual_seed(0)
    if random:
        for parameter in built.encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    built.encoder.eval()
    return replace(
        built, start_scale=SCALE, start_bias=BIAS, mean=(0.4, 0.5, 0.6), std=(0.5, 0.4, 0.3)
    )


def picture(seed=0, size=(70, 50)):
    """Coarse colours, resized smoothly: like a photograph, without its file."""
    coarse = torch.randint(0, 256, (7, 5, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(coarse.to(torch.uint8).numpy()).resize(size, Image.Resampling.BICUBIC)


def pixels_of(built, image):
    """(1, 3, H, W), as the towers take them in an evaluation."""
    inputs = Preprocessing.of(built)
    return ImageNormalizer(built.mean, built.std).pixels(evaluation_transform(inputs)(image)[None])


def features_of(built, pixels, captions=CAPTIONS):
    assert isinstance(built.tokenizer, ModelTokenizer)
    with torch.no_grad():
        return built.encoder.eval()(pixels, built.tokenizer(captions))
