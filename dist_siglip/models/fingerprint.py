"""Fingerprints of towers: equal for towers that give equal features."""

import hashlib
import json
from typing import Any

import torch

from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.data.samples.picture_policy import BEFORE_THE_SETTINGS
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.text_tower import describe_config

# Of training only, or where a file lies.
_IRRELEVANT = frozenset(
    {
        "patch_dropout",
        "timm_model_pretrained",
        "hf_tokenizer_name",
        "hf_model_name",
        "hf_model_pretrained",
    }
)


def tower_fingerprint(built: BuiltModel, tower: Tower) -> str:
    """Hash the weights of one tower and everything else that decides its features.

    Towers with the same digest give the same features, but for rounding. Half precision, an
    adapter or a changed weight gives another one.
    """
    digest = hashlib.blake2b(digest_size=8)
    if tower == "image":
        architecture = built.architecture["vision_cfg"]
        inputs: list[Any] = [
            built.image_size,
            built.mean,
            built.std,
            built.interpolation,
            built.resize_mode,
        ]
        policy = built.pictures.of_model
        # Digests of before there was a choice stay valid.
        inputs += [[key, policy[key]] for key in policy if policy[key] != BEFORE_THE_SETTINGS[key]]
    else:
        architecture = built.architecture["text_cfg"]
        inputs = [built.context_length]
        if architecture.get("hf_model_name"):
            inputs.append(describe_config(built.encoder.clip.text))
    architecture = {key: architecture[key] for key in architecture if key not in _IRRELEVANT}
    settings = [architecture, built.embed_dim, built.architecture.get("quick_gelu"), inputs]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(built.encoder.state_dict().items()):
        if name.startswith("clip.visual.") != (tower == "image"):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
