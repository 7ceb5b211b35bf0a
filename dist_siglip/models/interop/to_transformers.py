"""The folder that ``transformers.AutoModel`` and ``AutoProcessor.from_pretrained`` read.

    config.json, model.safetensors      SiglipModel or CLIPModel, scale and absolute bias
    preprocessor_config.json            resizing, mean and std
    tokenizer.json, ...                 see tokenizer_files.py

Sizes are read from the towers themselves. ``SiglipModel`` takes an image tower of timm with
attention pooling and a text tower without causal mask, pooled at its last token (SigLIP, and
SigLIP 2 at a fixed image size), ``Siglip2Model`` one whose pictures have any shape (NaFlex);
``CLIPModel`` takes open_clip's own CLIP.

The folder of ``sentence_transformers.SentenceTransformer`` is the same one with the list of its
modules (``modules.json``): towers and processor, then the division by the length.
"""

import importlib
import importlib.util
import json
import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import timm.models
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor

from dist_siglip.data.samples.patches import is_packed, patch_mask, unpack
from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.interop.comparison import CAPTIONS, Reader
from dist_siglip.models.interop.tokenizer_files import set_option, write_for_transformers
from dist_siglip.models.interop.transformers_format import (
    CONFIG_NAME,
    MAX_NUM_PATCHES,
    Family,
    activation_name,
    to_foreign_names,
)
from dist_siglip.models.naflex import NaFlexTower, to_fixed_names
from dist_siglip.models.text_tower import (
    WHOLE_TOKENIZER,
    load_whole_tokenizer,
    quiet_transformers,
)

logger = logging.getLogger(__name__)


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
    if isinstance(visual, NaFlexTower):
        return "siglip2"
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
    return _clip(built) if family == "clip" else _siglip(built)


def _siglip(built: BuiltModel) -> dict[str, Any]:
    architecture, clip = built.architecture, built.encoder.clip
    text, trunk = architecture["text_cfg"], clip.visual.trunk
    if not text.get("no_causal_mask") or text.get("pool_type") != "last":
        raise _no_class("a SigLIP whose text tower has a causal mask or is not pooled last")
    block = trunk.blocks[0]
    size: dict[str, Any] = {"image_size": built.image_size}
    if built.patches is not None:
        size = {"num_patches": math.prod(clip.visual.grid), "patch_size": built.patches.patch_size}
    else:
        size["patch_size"] = trunk.patch_embed.patch_size[0]
    return {
        "architectures": ["SiglipModel" if built.patches is None else "Siglip2Model"],
        "model_type": "siglip" if built.patches is None else "siglip2",
        "text_config": {**_text_tower(built), "projection_size": built.embed_dim},
        "vision_config": {
            "hidden_size": trunk.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": block.attn.num_heads,
            **size,
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


# PIL's numbers of its filters.
_BILINEAR, _BICUBIC = 2, 3
_TO_FLOATS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}


def write_hugging_face(built: BuiltModel, folder: Path) -> None:
    """Write a model as transformers reads it.

    Raises:
        UserError: If transformers is missing, or has no class or no words for the model.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError('to (hf) needs transformers; run: pip install "dist-siglip[hf]"')
    family = family_of(built)
    tensors = _tensors(built, family)
    config = describe(built, family)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # SiglipModel looks at padding, as it has learned to; it must not get a mask.
    names = ["input_ids", "attention_mask"] if family == "clip" else ["input_ids"]
    special = write_for_transformers(built, folder, names=names)
    if family == "siglip2":
        set_option(folder, WHOLE_TOKENIZER, True)
    config["text_config"] = {**special, **config["text_config"]}
    _write_json(folder / CONFIG_NAME, config)
    _write_json(folder / "preprocessor_config.json", _preprocessing(built, family))


def read_hugging_face(built: BuiltModel, folder: Path) -> Reader:
    """Read a folder with transformers alone."""
    from transformers import AutoModel, AutoProcessor

    with quiet_transformers():
        model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    if built.patches is not None:
        tokenizer = _whole_tokenizer(folder, tokenizer)

    def encode_captions(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return _unit(model.get_text_features(**tokens))

    def encode_image(images: Tensor) -> Tensor:
        if not is_packed(images):
            return _unit(model.get_image_features(pixel_values=images))
        patches, shapes = unpack(images)
        mask = patch_mask(images)
        found = model.get_image_features(
            pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes
        )
        return _unit(found)

    return Reader(
        encode_image=encode_image,
        encode_captions=encode_captions,
    )


_MODULES = ("transformer.Transformer", "normalize.Normalize")


def write_sentence_transformers(built: BuiltModel, folder: Path) -> None:
    """Write a model as sentence-transformers reads it.

    Raises:
        UserError: As ``write_hugging_face``; or the package is missing, transformers is too old, or
            pictures have any shape, whose folders transformers reads by a tokenizer of its own.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            'to (sentence-transformers) needs it; run: pip install "dist-siglip'
            '[sentence-transformers]"'
        )
    found = version("transformers")
    if found.startswith("4."):
        raise UserError(f"to (sentence-transformers) needs transformers 5, not {found}")
    if built.patches is not None:
        raise UserError(
            "to (sentence-transformers) takes pictures of one size only: transformers reads texts "
            "of a Siglip2Model by a tokenizer of its own; use hf or onnx"
        )
    write_hugging_face(built, folder)
    towers = {
        kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"}
        for kind in ("text", "image")
    }
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": towers,
        "module_output_name": "sentence_embedding",
        # As the towers were trained: texts padded to the whole length, pictures resized by Pillow.
        "processing_kwargs": {"text": {"padding": "max_length", "truncation": True}},
        "processor_kwargs": {"backend": "pil"},
    }
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": path,
            "type": f"sentence_transformers.base.modules.{kind}",
        }
        for i, (path, kind) in enumerate(zip(("", "1_Normalize"), _MODULES, strict=True))
    ]
    (folder / "1_Normalize").mkdir()
    _write_json(folder / "1_Normalize" / CONFIG_NAME, {"module_input_name": "sentence_embedding"})
    _write_json(folder / "sentence_bert_config.json", settings)
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    said = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}}
    _write_json(folder / "config_sentence_transformers.json", said)


def read_sentence_transformers(built: BuiltModel, folder: Path) -> Reader:
    """Read a folder with sentence-transformers alone."""
    package: Any = importlib.import_module("sentence_transformers")
    with quiet_transformers():
        model = package.SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    def encode_image(images: Tensor) -> Tensor:
        features: Tensor = model({"pixel_values": images, "modality": "image"})[
            "sentence_embedding"
        ]
        return features

    return Reader(
        encode_image=encode_image,
        encode_captions=lambda captions: model.encode(captions, convert_to_tensor=True),
    )


def _whole_tokenizer(folder: Path, theirs: Any) -> Any:
    """Load the tokenizer that was written, and say where ``AutoTokenizer`` gives another."""
    whole = load_whole_tokenizer(folder)
    options: dict[str, Any] = {"padding": "max_length", "truncation": True}
    captions = list(CAPTIONS)
    if theirs(captions, **options)["input_ids"] != whole(captions, **options)["input_ids"]:
        logger.warning(
            "AutoTokenizer of this transformers makes other tokens of some captions than the model "
            "was trained with, as of any folder of Siglip2Model; take "
            "transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER)"
        )
    return whole


def _unit(features: Any) -> Tensor:
    """Features of length 1; newer versions wrap them."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def _tensors(built: BuiltModel, family: Family) -> dict[str, Tensor]:
    try:
        own = to_fixed_names(built.encoder.clip.state_dict(), flat_patches=True)
        towers = to_foreign_names(family, own)
    except KeyError as error:
        raise UserError(
            f"to (hf): transformers has no counterpart for {error.args[0]} of this model; use "
            "open_clip, safetensors or onnx"
        ) from error
    tensors = {name: value.detach().cpu().clone() for name, value in towers.items()}
    log_scale = torch.tensor(math.log(built.start_scale))
    if family == "clip":
        return {**tensors, "logit_scale": log_scale}
    bias = torch.tensor([float(built.start_bias)])
    return {**tensors, "logit_scale": log_scale[None], "logit_bias": bias}


def _preprocessing(built: BuiltModel, family: Family) -> dict[str, Any]:
    side = built.image_size
    square = {"height": side, "width": side}
    if built.resize_mode not in ("squash", "shortest"):
        raise UserError(
            f"to (hf) cannot express resize_mode ({built.resize_mode}); transformers squashes, or "
            "resizes the shortest side; use open_clip, safetensors or onnx"
        )
    is_squashed = built.resize_mode == "squash"
    crop = {"do_center_crop": not is_squashed, "crop_size": square}
    if built.patches is not None:
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            # Siglip2Processor pads texts to 64 tokens, whatever the model has.
            "processor_class": "SiglipProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "resample": _BILINEAR,
            **_TO_FLOATS,
            "image_mean": built.mean,
            "image_std": built.std,
            "patch_size": built.patches.patch_size,
            MAX_NUM_PATCHES: built.patches.num_patches,
            **built.pictures.of_model,
        }
    is_siglip = family == "siglip"
    # SigLIP's own cannot crop.
    is_plain = is_siglip and is_squashed
    return {
        "image_processor_type": "SiglipImageProcessor" if is_plain else "CLIPImageProcessor",
        "processor_class": "SiglipProcessor" if is_siglip else "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if is_squashed else {"shortest_edge": side},
        "resample": _BILINEAR if built.interpolation == "bilinear" else _BICUBIC,
        **({} if is_plain else crop),
        **_TO_FLOATS,
        "image_mean": built.mean,
        "image_std": built.std,
        **built.pictures.of_model,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
