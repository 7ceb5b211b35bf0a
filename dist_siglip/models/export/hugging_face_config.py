"""Which config of transformers describes these towers?

Sizes are read from the towers themselves. ``SiglipModel`` takes an image tower of timm with
attention pooling and a text tower without causal mask, pooled at its last token (SigLIP, and
SigLIP 2 at a fixed image size); ``CLIPModel`` takes open_clip's own CLIP.
"""

from typing import Any

import timm.models
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.export.activation import activation_name
from dist_siglip.models.hugging_face_names import Family


def family_of(built: BuiltModel) -> Family:
    """Return which of transformers' dual encoders the towers are of.

    Raises:
        UserError: If they are of neither.
    """
    visual = built.encoder.clip.visual
    if not isinstance(built.image_size, int):
        raise UserError(f"to (hf) takes square pictures only, not {built.image_size}; use onnx")
    text_model = built.architecture["text_cfg"].get("hf_model_name")
    if text_model:
        raise _no_class(f"a text tower {text_model}")
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, timm.models.VisionTransformer):
        return "siglip"
    if isinstance(visual, VisionTransformer):
        return "clip"
    name = built.architecture["vision_cfg"].get("timm_model_name") or type(visual).__name__
    raise _no_class(f"an image tower {name}")


def describe(built: BuiltModel, family: Family) -> dict[str, Any]:
    """Return the content of ``config.json``, without token ids.

    Args:
        built: a model whose tensors all have names in the family.
        family: see ``family_of``.

    Raises:
        UserError: If transformers combines the tensors in another way.
    """
    return _siglip(built) if family == "siglip" else _clip(built)


def _siglip(built: BuiltModel) -> dict[str, Any]:
    architecture, clip = built.architecture, built.encoder.clip
    text, trunk = architecture["text_cfg"], clip.visual.trunk
    if not text.get("no_causal_mask") or text.get("pool_type") != "last":
        raise _no_class("a SigLIP whose text tower has a causal mask or is not pooled last")
    block = trunk.blocks[0]
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {**_text_tower(built), "projection_size": built.embed_dim},
        "vision_config": {
            "hidden_size": trunk.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": built.image_size,
            "patch_size": trunk.patch_embed.patch_size[0],
            "hidden_act": activation_name(block.mlp.act),
            "layer_norm_eps": block.norm1.eps,
        },
    }


def _clip(built: BuiltModel) -> dict[str, Any]:
    text, visual = built.architecture["text_cfg"], built.encoder.clip.visual
    pooling = text.get("pool_type", "argmax")
    # To transformers 2 means the highest id, which is argmax.
    end = text.get("eos_id", 2) if pooling == "eos" else 2
    if (
        text.get("no_causal_mask")
        or pooling not in ("argmax", "eos")
        or (pooling, end) == ("eos", 2)
    ):
        raise _no_class(f"CLIP with text pooling {pooling} (eos_id {end}) or without causal mask")
    if visual.pool_type != "tok" or visual.final_ln_after_pool:
        raise _no_class(f"CLIP with image pooling {visual.pool_type}")
    block = visual.transformer.resblocks[0]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": built.embed_dim,
        # CLIPModel has a scale alone; the bias is kept here.
        "logit_bias": built.start_bias,
        "text_config": {**_text_tower(built), "eos_token_id": end},
        "vision_config": {
            "hidden_size": block.ln_1.weight.shape[0],
            "intermediate_size": block.mlp.c_fc.weight.shape[0],
            "num_hidden_layers": len(visual.transformer.resblocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": built.image_size,
            "patch_size": visual.patch_size[0],
            "hidden_act": activation_name(block.mlp.gelu),
            "layer_norm_eps": block.ln_1.eps,
        },
    }


def _text_tower(built: BuiltModel) -> dict[str, Any]:
    clip = built.encoder.clip
    tower = clip.text if hasattr(clip, "text") else clip
    block = tower.transformer.resblocks[0]
    return {
        "hidden_size": block.ln_1.weight.shape[0],
        "intermediate_size": block.mlp.c_fc.weight.shape[0],
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "vocab_size": tower.token_embedding.weight.shape[0],
        "max_position_embeddings": built.context_length,
        "hidden_act": activation_name(block.mlp.gelu),
        "layer_norm_eps": block.ln_1.eps,
    }


def _no_class(what: str) -> UserError:
    return UserError(
        f"to (hf): transformers has no class for {what}; use open_clip, safetensors or onnx"
    )
