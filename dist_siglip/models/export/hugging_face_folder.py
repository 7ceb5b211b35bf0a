"""The folder that ``transformers.AutoModel`` and ``AutoProcessor.from_pretrained`` read.

config.json, model.safetensors      SiglipModel or CLIPModel, scale and absolute bias
preprocessor_config.json            resizing, mean and std
tokenizer.json, ...                 see tokenizer_files.py
"""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.export.comparison import Reader
from dist_siglip.models.export.hugging_face_config import describe, family_of
from dist_siglip.models.export.tokenizer_files import write_for_transformers
from dist_siglip.models.hugging_face import CONFIG_NAME
from dist_siglip.models.hugging_face_names import Family, to_foreign_names
from dist_siglip.models.text_tower import quiet_transformers

# PIL's numbers of its filters.
_BILINEAR, _BICUBIC = 2, 3


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
    names = ["input_ids"] if family == "siglip" else ["input_ids", "attention_mask"]
    special = write_for_transformers(built, folder, names=names)
    config["text_config"] = {**special, **config["text_config"]}
    _write_json(folder / CONFIG_NAME, config)
    _write_json(folder / "preprocessor_config.json", _preprocessing(built, family))


def read_hugging_face(built: BuiltModel, folder: Path) -> Reader:
    """Read a folder with transformers alone."""
    from transformers import AutoModel, AutoProcessor

    with quiet_transformers():
        model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)

    def encode_captions(captions: list[str]) -> Tensor:
        tokens = processor(
            text=captions, padding="max_length", truncation=True, return_tensors="pt"
        )
        return _unit(model.get_text_features(**tokens))

    return Reader(
        encode_image=lambda images: _unit(model.get_image_features(pixel_values=images)),
        encode_captions=encode_captions,
    )


def _unit(features: Any) -> Tensor:
    """Features of length 1; newer versions wrap them."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def _tensors(built: BuiltModel, family: Family) -> dict[str, Tensor]:
    try:
        towers = to_foreign_names(family, built.encoder.clip.state_dict())
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
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": built.mean,
        "image_std": built.std,
        **built.pictures.of_model,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
