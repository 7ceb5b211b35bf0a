"""Tiny architectures of every open_clip kind, and networks of them with random weights."""

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import torch

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TIMM = {
    "image_size": 32,
    "timm_model_name": "test_vit",
    "timm_pool": "map",
    "timm_proj": "none",
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT},
    "resnet": {"embed_dim": 8, "vision_cfg": RESNET, "text_cfg": TEXT},
    "custom_text": {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
    # The shape of open_clip's SigLIP models, smaller.
    "siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": TIMM,
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
}


def network_of(architecture: dict[str, Any]) -> torch.nn.Module:
    """open_clip's network with random weights, built by open_clip's classes alone."""
    config = copy.deepcopy(architecture)
    cls = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    network = cls(**config)
    if "timm_model_name" in config["vision_cfg"]:
        network.visual.set_input_size(config["vision_cfg"]["image_size"])
    for parameter in network.parameters():
        if parameter.ndim > 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def inputs_of(
    architecture: dict[str, Any], num_pairs: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pixels, and token rows that end in the highest id, where open_clip pools."""
    size = architecture["vision_cfg"]["image_size"]
    length = architecture["text_cfg"]["context_length"]
    texts = torch.randint(1, 40000, (num_pairs, length))
    texts[:, -1] = 49407
    return torch.randn(num_pairs, 3, size, size), texts


def write_config(path: Path, architecture: dict[str, Any]) -> str:
    """Write a JSON model config and return its path as ``model`` takes it."""
    path.write_text(json.dumps(architecture))
    return str(path)
