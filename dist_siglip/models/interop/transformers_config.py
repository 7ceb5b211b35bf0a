"""Configs of transformers folders, translated to open_clip's.

A folder with a ``config.json`` of model type siglip, siglip2 or clip describes towers that
open_clip and timm can build: a ViT of timm with attention pooling and open_clip's text
transformer, or open_clip's own CLIP. Sizes are read from the config, so no list of published
models is needed. Only files are read here; transformers itself is not imported.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import nn

from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import read_json


def activation_name(layer: nn.Module) -> str:
    """Return the name transformers has for an activation, found by what it computes.

    open_clip, timm and torch have several classes of the same function.

    Raises:
        UserError: If it is none of the three of dual encoders.

    Example:
        >>> activation_name(nn.GELU()), activation_name(nn.GELU(approximate="tanh"))
        ('gelu', 'gelu_pytorch_tanh')
    """
    probe = torch.linspace(-4, 4, 65)
    found = layer(probe.clone())
    for name, values in (
        ("gelu", F.gelu(probe)),
        ("gelu_pytorch_tanh", F.gelu(probe, approximate="tanh")),
        ("quick_gelu", probe * torch.sigmoid(1.702 * probe)),
    ):
        # The three differ by 4e-4 and more.
        if torch.allclose(found, values, rtol=0, atol=1e-5):
            return name
    raise UserError(f"activation {type(layer).__name__} is neither GELU nor QuickGELU")


CONFIG_NAME = "config.json"
WEIGHT_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
TOKENIZER_NAMES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
# What transformers leaves out of a config that has its default.
_SIGLIP_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_CLIP_TOWER = {**_SIGLIP_TOWER, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_CLIP_TEXT = {
    **_CLIP_TOWER,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
_SIGLIP_TEXT = {**_SIGLIP_TOWER, "vocab_size": 32000, "max_position_embeddings": 64}
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}},
}


def fetch_folder(repository: str, with_weights: bool) -> str:
    """Fetch a repository of transformers from the hub, once, and return its folder here.

    Only configs, tokenizer files and one kind of weights are taken: safetensors if there are any.
    """
    small = ["*config.json", "special_tokens_map.json", "merges.txt", *TOKENIZER_NAMES]
    if not with_weights:
        return snapshot_download(repository, allow_patterns=small)
    folder = snapshot_download(repository, allow_patterns=[*small, "model*.safetensors*"])
    if not any((Path(folder) / name).is_file() for name in WEIGHT_NAMES):
        folder = snapshot_download(repository, allow_patterns=["pytorch_model.bin"])
    return folder


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what a folder that ``save_pretrained`` of transformers wrote says of its model.

    Returns:
        open_clip's model config and its preprocessing config.

    Raises:
        UserError: If a file is missing or damaged, or the model is none of the three.
    """
    path = folder / CONFIG_NAME
    architecture = _architecture(_read(path), path)
    if not any((folder / name).is_file() for name in TOKENIZER_NAMES):
        raise UserError(
            f"folder {folder} holds no tokenizer (none of {', '.join(TOKENIZER_NAMES)}); copy the "
            "tokenizer files of the model into it"
        )
    return architecture, _preprocessing(folder, architecture)


def weights_in_folder(folder: Path) -> Path:
    """Return the weights file of such a folder.

    Raises:
        UserError: If there is none.
    """
    weights = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"folder {folder} holds no weights; expected {' or '.join(WEIGHT_NAMES)}")
    return weights


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({text}); fetch the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be an object; fetch the model again")
    return content


def _architecture(config: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = config.get("model_type")
    image, text = config.get("vision_config") or {}, config.get("text_config") or {}
    try:
        if kind == "clip":
            return _clip(config, {**_CLIP_TOWER, **image}, {**_CLIP_TEXT, **text}, path)
        if kind in ("siglip", "siglip2"):
            return _siglip(kind, {**_SIGLIP_TOWER, **image}, {**_SIGLIP_TEXT, **text}, path)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path} has sizes that are no numbers ({error}); correct it") from error
    raise UserError(f"model_type ({kind}) of {path} must be siglip, siglip2 or clip")


def _siglip(kind: str, image: dict[str, Any], text: dict[str, Any], path: Path) -> dict[str, Any]:
    patch_size = image.get("patch_size", 16)
    size = image.get("image_size", 224)
    if kind == "siglip2" and "image_size" not in image:
        size = math.isqrt(image.get("num_patches", 256)) * patch_size
    if "quick_gelu" in (image["hidden_act"], text["hidden_act"]):
        raise UserError(f"hidden_act (quick_gelu) of {path} is of CLIP; SigLIP towers have gelu")
    if not image.get("vision_use_head", True):
        raise UserError(f"{path} has no pooling head (vision_use_head: false), so no features")
    vision = {
        "image_size": size,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "none",
        "patch_size": patch_size,
        "head_width": image["hidden_size"] // image["num_attention_heads"],
        **_sizes(image, path),
    }
    embed_dim = text.get("projection_size") or text["hidden_size"]
    if embed_dim != image["hidden_size"]:
        raise UserError(
            f"{path}: width of the image tower ({image['hidden_size']}) and projection_size "
            f"({embed_dim}) must be equal"
        )
    return {
        "embed_dim": embed_dim,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "hf_tokenizer_name": str(path.parent),
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "heads": text["num_attention_heads"],
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            **_sizes(text, path),
        },
    }


def _clip(
    config: dict[str, Any], image: dict[str, Any], text: dict[str, Any], path: Path
) -> dict[str, Any]:
    quick = {tower["hidden_act"] == "quick_gelu" for tower in (image, text)}
    if len(quick) > 1:
        raise UserError(f"{path}: hidden_act of both towers must be quick_gelu, or of none")
    end = text["eos_token_id"]
    # transformers reads 2 as "the highest id", as open_clip does by itself.
    is_highest = end in (2, text["vocab_size"] - 1)
    # CLIPModel has no bias; an export of ours leaves it in the config.
    bias = config.get("logit_bias")
    return {
        "embed_dim": config.get("projection_dim", 512),
        **({} if bias is None else {"init_logit_bias": float(bias)}),
        "quick_gelu": quick == {True},
        "vision_cfg": {
            "image_size": image.get("image_size", 224),
            "patch_size": image.get("patch_size", 32),
            "head_width": image["hidden_size"] // image["num_attention_heads"],
            **_sizes(image, path),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "hf_tokenizer_name": str(path.parent),
            "heads": text["num_attention_heads"],
            **({} if is_highest else {"pool_type": "eos", "eos_id": end}),
            **_sizes(text, path),
        },
    }


def _sizes(tower: dict[str, Any], path: Path) -> dict[str, Any]:
    """Depth, width, activation and norm, which all towers state alike."""
    activation = tower["hidden_act"]
    if activation != "quick_gelu" and activation not in _ACTIVATIONS:
        known = ", ".join((*_ACTIVATIONS, "quick_gelu"))
        raise UserError(f"hidden_act ({activation}) of {path} must be one of {known}")
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    ratio = inner / width
    return {
        "width": width,
        "layers": tower["num_hidden_layers"],
        # Towers round width * ratio down; the half keeps a product such as 4303.99 above.
        "mlp_ratio": ratio if int(width * ratio) == inner else (inner + 0.5) / width,
        "norm_kwargs": {"eps": tower["layer_norm_eps"]},
        **_ACTIVATIONS.get(activation, {}),
    }


def _preprocessing(folder: Path, architecture: dict[str, Any]) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        path = folder / "processor_config.json"
    said = _read(path) if path.is_file() else {}
    said = said.get("image_processor", said)
    is_clip = not architecture.get("custom_text")
    size = said.get("size")
    is_shortest = "shortest_edge" in size if isinstance(size, dict) else is_clip
    overlay: dict[str, Any] = {
        "interpolation": _RESAMPLING.get(said.get("resample", 3 if is_clip else 2), "bicubic"),
        "resize_mode": "shortest" if is_shortest else "squash",
    }
    if not is_clip:
        overlay |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if said.get(theirs):
            overlay[ours] = tuple(said[theirs])
    overlay |= {key: said[key] for key in PicturePolicy().of_model if key in said}
    return complete_preprocessing(overlay)


def complete_preprocessing(stated: dict[str, Any]) -> dict[str, Any]:
    """Fill in open_clip's defaults, and keep what an export of ours adds to its names."""
    added = {key: stated[key] for key in PicturePolicy().of_model if key in stated}
    return {**merge_preprocess_dict(PreprocessCfg(), stated), **added}
