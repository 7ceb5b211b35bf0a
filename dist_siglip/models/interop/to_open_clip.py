"""The folder that ``open_clip.create_model_from_pretrained("local-dir:...")`` reads.

    open_clip_config.json           architecture and preprocessing
    open_clip_model.safetensors     towers, logarithm of the scale, absolute bias
    tokenizer.json, ...             the tokenizer, if it is one of Hugging Face
    config.json                     the text tower, if it is one of Hugging Face

open_clip builds an image tower of timm by its name alone, at the size that belongs to the name, and
resamples no position embeddings. So a tower can be written for open_clip exactly if a name stands
for it. ``safetensors`` is the same folder for the others: this package reads it as
``local-dir:...`` too.
"""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from dist_siglip.data.samples.patches import is_packed, unpack_pictures
from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel, build_dual_encoder
from dist_siglip.models.dual_encoder import unit_rows
from dist_siglip.models.interop.comparison import Reader
from dist_siglip.models.interop.tokenizer_files import tokenizer_of
from dist_siglip.models.interop.transformers_format import CONFIG_NAME as TEXT_CONFIG_NAME
from dist_siglip.models.interop.transformers_format import MAX_NUM_PATCHES, activation_name
from dist_siglip.models.text_tower import describe_config
from dist_siglip.models.weight_source import CONFIG_NAME, LOCAL_DIR, WEIGHT_NAMES


def name_of_tower(visual: nn.Module, embed_dim: int, vision: dict[str, Any]) -> str | None:
    """Return timm's name of an image tower, or None if there is none.

    The tower's own name is tried first, then those of the SigLIP towers of all sizes.

    Args:
        visual: ``open_clip.timm_model.TimmModel``.
        embed_dim: D.
        vision: ``vision_cfg`` of its config.
    """
    own: str = vision["timm_model_name"]
    names = [own]
    if own.startswith("naflexvit"):
        names += timm.list_models("naflexvit_*_siglip*")
    if "_siglip_" in own:
        names += [n for n in timm.list_models("vit_*_siglip_*") if _side(n) == vision["image_size"]]
    for name in names:
        with torch.device("meta"):
            candidate = TimmModel(
                name,
                embed_dim,
                image_size=vision["image_size"],
                pool=vision.get("timm_pool", "avg"),
                proj=vision.get("timm_proj", "linear"),
                proj_bias=vision.get("timm_proj_bias", False),
            )
        if list(_facts(candidate)) == list(_facts(visual)):
            return name
    return None


def _side(name: str) -> int | None:
    """The side of the pictures that belongs to a name, in pixels."""
    published = timm.get_pretrained_cfg(name)
    return None if published is None else int(published.input_size[-1])


def _facts(visual: nn.Module) -> Iterator[Any]:
    """What must agree for equal weights to give equal features."""
    for key, value in visual.state_dict().items():
        yield key, tuple(value.shape)
    trunk: Any = visual.trunk
    yield trunk.embeds.patch_size if hasattr(trunk, "embeds") else None
    # Towers with positions take pictures of one size only.
    yield getattr(trunk.patch_embed, "img_size", None) if hasattr(trunk, "patch_embed") else None
    for layer in trunk.modules():
        if hasattr(layer, "num_heads"):
            yield layer.num_heads
        if isinstance(layer, nn.LayerNorm):
            yield layer.eps
        if type(layer).__name__ in ("GELU", "GELUTanh", "QuickGELU"):
            yield activation_name(layer)


# Sizes that are part of the name of a timm tower.
_STATED_SIZES = (
    "width",
    "layers",
    "head_width",
    "mlp_ratio",
    "patch_size",
    "act_kwargs",
    "norm_kwargs",
)


def write_open_clip(built: BuiltModel, folder: Path) -> None:
    """Write a model as open_clip reads it.

    Raises:
        UserError: If open_clip has no name for the image tower.
    """
    architecture = _architecture(built)
    vision = architecture["vision_cfg"]
    if vision.get("timm_model_name"):
        name = name_of_tower(built.encoder.clip.visual, built.embed_dim, vision)
        if name is None:
            raise UserError(_no_name(built))
        for key in _STATED_SIZES:
            vision.pop(key, None)
        vision["timm_model_name"] = name
    _write(built, architecture, folder)


def write_safetensors(built: BuiltModel, folder: Path) -> None:
    """Write any model as this package reads it: open_clip's names, and sizes where they decide."""
    _write(built, _architecture(built), folder)


def read_open_clip(built: BuiltModel, folder: Path) -> Reader:
    """Read a folder with open_clip alone."""
    name = f"{LOCAL_DIR}{folder}"
    network: Any = open_clip.create_model_from_pretrained(name, return_transform=False)
    network.eval()
    tokenizer = open_clip.get_tokenizer(name)
    return Reader(
        encode_image=lambda images: unit_rows(_encode_pictures(network, images)),
        encode_captions=lambda captions: unit_rows(network.encode_text(tokenizer(captions))),
    )


def _encode_pictures(network: Any, images: Tensor) -> Tensor:
    """Let open_clip encode pictures; those of a NaFlex tower one by one, each of its own shape."""
    if not is_packed(images):
        found: Tensor = network.encode_image(images)
        return found
    return torch.cat([network.encode_image(picture) for picture in unpack_pictures(images)])


def read_safetensors(built: BuiltModel, folder: Path) -> Reader:
    """Read a folder with this package."""
    read = build_dual_encoder(f"{LOCAL_DIR}{folder}")
    read.encoder.eval()
    return Reader(
        encode_image=read.encoder.encode_image,
        encode_captions=lambda captions: read.encoder.encode_text(read.tokenizer(captions)),
    )


def _architecture(built: BuiltModel) -> dict[str, Any]:
    """The model config, without what is of training or of this machine."""
    architecture = copy.deepcopy(built.architecture)
    architecture["init_logit_bias"] = built.start_bias
    architecture["vision_cfg"].pop("patch_dropout", None)
    tokenizer = architecture["text_cfg"].get("hf_tokenizer_name")
    if tokenizer and (Path(tokenizer).is_absolute() or Path(tokenizer).exists()):
        # Any name will do: of a local folder, open_clip takes the tokenizer that lies in it.
        architecture["text_cfg"]["hf_tokenizer_name"] = "."
    for part, key in (("text_cfg", "hf_model"), ("vision_cfg", "timm_model")):
        architecture[part].pop(f"{key}_pretrained", None)
    return architecture


def name_text_tower(folder: Path, final: str) -> None:
    """Name the place that an export will have as that of its text tower.

    open_clip looks for the config of a text tower of Hugging Face by a name on the hub or a path
    from the root; a path of this machine gives way to the export itself, which has that config.

    Args:
        folder: where the export is now.
        final: repository that it is pushed to, or path from the root.
    """
    path = folder / CONFIG_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    text = content["model_cfg"]["text_cfg"]
    if Path(text.get("hf_model_name") or "").is_absolute():
        text["hf_model_name"] = final
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write(built: BuiltModel, architecture: dict[str, Any], folder: Path) -> None:
    text = architecture["text_cfg"]
    if text.get("hf_model_name"):
        if Path(text["hf_model_name"]).is_dir():
            text["hf_model_name"] = str(folder.absolute())
        description = describe_config(built.encoder.clip.text)
        description["model_type"] = built.encoder.clip.text.config.model_type
        (folder / TEXT_CONFIG_NAME).write_text(json.dumps(description, indent=2) + "\n", "utf-8")
    preprocessing = {
        "size": built.image_size,
        "mode": "RGB",
        "mean": built.mean,
        "std": built.std,
        "interpolation": built.interpolation,
        "resize_mode": built.resize_mode,
        "fill_color": 0,
        **built.pictures.of_model,  # open_clip passes over what it has no word for
        **({} if built.patches is None else {MAX_NUM_PATCHES: built.patches.num_patches}),
    }
    config = {"model_cfg": architecture, "preprocess_cfg": preprocessing}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(
        _tensors(built), folder / WEIGHT_NAMES[0], metadata={"format": "pt"}
    )
    tokenizer = tokenizer_of(built).loaded()
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_pretrained(folder)


def _tensors(built: BuiltModel) -> dict[str, Tensor]:
    """All tensors by open_clip's names, logarithm of the scale and absolute bias among them."""
    towers = built.encoder.clip.state_dict()
    return {
        # A copy each: safetensors refuses tensors that share memory.
        **{name: value.detach().cpu().contiguous().clone() for name, value in towers.items()},
        "logit_scale": torch.tensor(math.log(built.start_scale)),
        "logit_bias": torch.tensor(float(built.start_bias)),
    }


def _no_name(built: BuiltModel) -> str:
    name = built.architecture["vision_cfg"]["timm_model_name"]
    return (
        f"to (open_clip) cannot express this image tower ({name} at {built.image_size} pixels): "
        "open_clip builds towers of timm by name, each at one size and with one activation, and no "
        "name stands for this one; use hf, safetensors or onnx"
    )
