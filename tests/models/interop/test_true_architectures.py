"""The published architectures, with random weights, through export and back."""

import copy

import open_clip
import pytest
import torch

from dist_siglip.models.architecture import instantiate
from dist_siglip.models.interop.export import export_model
from dist_siglip.models.interop.to_open_clip import name_of_tower
from tests.support.exports import built_from

pytestmark = pytest.mark.e2e

SIGLIPS = [name for name in open_clip.list_models() if name.startswith("ViT-") and "SigLIP" in name]


def without_download(name):
    """A built-in architecture with open_clip's own tokenizer, and its text tower cut short."""
    architecture = copy.deepcopy(open_clip.get_model_config(name))
    architecture["text_cfg"].pop("hf_tokenizer_name", None)
    return {
        **architecture,
        "text_cfg": {**architecture["text_cfg"], "vocab_size": 49408, "layers": 2},
    }


@pytest.mark.parametrize("to", ["open_clip", "hf"])
@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-B-32-SigLIP2-256", "ViT-B-32"])
def test_features_are_equal(name, to, tmp_path):
    pytest.importorskip("transformers")
    built = built_from(without_download(name), tmp_path, random=False)
    done = export_model(built, tmp_path / "out", to=to)
    assert done.largest_difference <= 1e-6


def test_there_are_many_siglips():
    assert len(SIGLIPS) >= 26


@pytest.mark.parametrize("name", SIGLIPS)
def test_each_siglip_of_open_clip_keeps_its_name(name):
    architecture = open_clip.get_model_config(name)
    vision = architecture["vision_cfg"]
    with torch.device("meta"):
        network = instantiate(architecture, name=name)
    found = name_of_tower(network.visual, architecture["embed_dim"], vision)
    assert found == vision["timm_model_name"]
