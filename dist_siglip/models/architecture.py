"""Networks of open_clip with random weights, built from a model config.

open_clip's own factory also fetches weights, guesses and warns through the root logger; here a
config is checked and built, nothing else. Image towers of timm are brought to the image size the
config states (open_clip leaves them at timm's native size).
"""

import dataclasses
import difflib
import inspect
from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import open_clip
import timm
from timm.models.naflexvit import NaFlexVit
from torch import nn

from dist_siglip.errors import UserError
from dist_siglip.models.naflex import NaFlexTower, change_form, is_naflex
from dist_siglip.models.text_tower import check_text_config

DEFAULT_CONTEXT_LENGTH = 77
# What open_clip, timm and PyTorch raise for sizes that do not fit together, or into the memory.
_CANNOT_BUILD = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Keys of a model config that count something.
_SIZES = (
    "embed_dim",
    "image_size",
    "patch_size",
    "layers",
    "width",
    "head_width",
    "heads",
    "context_length",
    "vocab_size",
)
_LARGEST_SIZE = 2**24


def override_architecture(
    architecture: dict[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
    patch_dropout: float | None = None,
    num_patches: int | None = None,
    name: str = "the model",
) -> dict[str, Any]:
    """Return a copy of a model config with some values replaced; None keeps the config's value.

    ``num_patches`` makes the image tower one of pictures of any shape (NaFlex), ``image_size`` one
    of pictures of a fixed size.

    Raises:
        UserError: If a value is out of range, the image tower cannot drop patches, or it has no
            form for such pictures.

    Example:
        >>> tiny = {"embed_dim": 8, "vision_cfg": {"image_size": 224}, "text_cfg": {}}
        >>> override_architecture(tiny, image_size=64)["vision_cfg"]
        {'image_size': 64}
        >>> tiny["vision_cfg"]
        {'image_size': 224}
    """
    changed = deepcopy(architecture)
    if num_patches is not None:
        if image_size is not None:
            raise UserError(
                f"num_patches ({num_patches}) is of pictures of any shape, image_size "
                f"({image_size}) of one size; set one of them to null"
            )
        if not is_naflex(changed):
            changed = change_form(changed, name, setting=f"num_patches ({num_patches})")
    if image_size is not None and is_naflex(changed):
        changed = change_form(changed, name, setting=f"image_size ({image_size})")
    if image_size is not None:
        sides = (image_size,) if isinstance(image_size, int) else tuple(image_size)
        if not all(side > 0 for side in sides):
            raise UserError(f"image_size ({image_size}) must be positive; give pixels, e.g. 224")
        changed["vision_cfg"]["image_size"] = image_size
    if context_length is not None:
        if context_length < 2:
            raise UserError(f"context_length ({context_length}) must be at least 2 tokens")
        changed["text_cfg"]["context_length"] = context_length
    if patch_dropout is not None:
        if not 0 <= patch_dropout < 1:
            raise UserError(f"patch_dropout ({patch_dropout}) must be in [0, 1); 0 turns it off")
        if patch_dropout > 0 and is_resnet(changed):
            raise UserError(f"patch_dropout ({patch_dropout}) needs a ViT image tower; set it to 0")
        changed["vision_cfg"]["patch_dropout"] = patch_dropout
    return changed


def is_resnet(architecture: dict[str, Any]) -> bool:
    """Whether the image tower is open_clip's own ResNet, which has neither patches nor blocks."""
    vision = architecture["vision_cfg"]
    return not vision.get("timm_model_name") and isinstance(vision.get("layers"), list | tuple)


def instantiate(
    architecture: dict[str, Any], *, name: str, with_image_weights: bool = False
) -> nn.Module:
    """Build the network of a model config, on the CPU, in fp32, with random weights.

    Returns:
        ``open_clip.CLIP``, or ``open_clip.CustomTextCLIP`` where the config needs a text tower of
        its own; see ``has_own_text_tower``.

    Raises:
        UserError: If the config has unknown keys, names an unknown tower, is a captioning model
            (CoCa), or its sizes do not fit together.
    """
    config = deepcopy(architecture)
    check_architecture(config, name)
    # Weights of single towers are never fetched behind the user's back.
    config["vision_cfg"]["timm_model_pretrained"] = with_image_weights
    config["text_cfg"]["hf_model_pretrained"] = False
    trunk = siglip_trunk(config["vision_cfg"])
    if trunk is not None and with_image_weights:
        raise UserError(
            f"timm_model_pretrained (true) of model {name} cannot be had for an image tower whose "
            "sizes the config states; leave out width, layers and patch_size, or set it to false"
        )
    if trunk is not None:
        # The smallest tower of timm holds the place of the one described.
        config["vision_cfg"]["timm_model_name"] = "test_vit"
    model_class = open_clip.CustomTextCLIP if has_own_text_tower(config) else open_clip.CLIP
    config.pop("custom_text", None)
    try:
        network: nn.Module = model_class(**config)
        if trunk is not None:
            visual: Any = network.visual
            visual.trunk = timm.create_model(**trunk)
        _fit_image_size(network)
        if isinstance(getattr(network.visual, "trunk", None), NaFlexVit):
            network.visual = NaFlexTower(network.visual)
    except UserError:
        raise
    except _CANNOT_BUILD as error:
        raise UserError(
            f"model {name} cannot be built from its config ({' '.join(str(error).split())[:200]}); "
            "correct vision_cfg or text_cfg"
        ) from error
    return network


def has_own_text_tower(architecture: dict[str, Any]) -> bool:
    """Whether the text tower is a module of its own, as open_clip's factory decides it.

    A config says so (``custom_text``), or names a tower that ``open_clip.CLIP`` cannot hold: one of
    Hugging Face, or, in open_clip 4, one of the kind "modern".

    Example:
        >>> has_own_text_tower({"text_cfg": {"text_arch": "modern"}})
        True
        >>> has_own_text_tower({"text_cfg": {"width": 512}})
        False
    """
    text = architecture["text_cfg"]
    is_modern = text.get("text_arch") == "modern"
    return bool(architecture.get("custom_text") or text.get("hf_model_name") or is_modern)


def siglip_trunk(vision: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments for timm's image tower of SigLIP where the config states its sizes, else None.

    open_clip builds timm's towers by name alone. A config of ours may add ``width``, ``layers``,
    ``head_width``, ``mlp_ratio``, ``patch_size``, ``act_kwargs`` and ``norm_kwargs`` to the name of
    a SigLIP tower, which are those of open_clip's own towers; then they decide.
    """
    name = vision.get("timm_model_name") or ""
    flex = name.startswith("naflexvit")
    if not (flex or "_siglip_" in name) or "width" not in vision:
        return None
    norm = partial(nn.LayerNorm, **(vision.get("norm_kwargs") or {"eps": 1e-6}))
    size, patch = vision["image_size"], vision["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    grid = {"pos_embed_grid_size": (height // patch, width // patch)}
    return {
        "model_name": name,
        "pretrained": False,
        "num_classes": 0,
        "global_pool": vision.get("timm_pool", "map"),
        **(grid if flex else {"img_size": size}),
        "patch_size": patch,
        "embed_dim": vision["width"],
        "depth": vision["layers"],
        "num_heads": vision["width"] // vision["head_width"],
        "mlp_ratio": vision["mlp_ratio"],
        "norm_layer": norm,
        "act_layer": partial(nn.GELU, **(vision.get("act_kwargs") or {})),
        "patch_drop_rate": vision.get("patch_dropout", 0.0),
    }


def _fit_image_size(network: nn.Module) -> None:
    """Resize a timm image tower, built at its native size, to the size of the config."""
    visual: Any = network.visual
    if hasattr(getattr(visual, "trunk", None), "set_input_size"):
        visual.set_input_size(visual.image_size)


def check_architecture(architecture: dict[str, Any], name: str) -> None:
    """Refuse a model config that no dual encoder can be built from.

    Raises:
        UserError: If the config has unknown keys, names an unknown tower, or is a captioning model.
    """
    refuse_captioning(architecture, name)
    config = architecture
    top_level = set(inspect.signature(open_clip.CLIP.__init__).parameters) - {"self"}
    _check_keys(config, top_level | {"custom_text"}, name, "the config")
    for section, schema in (
        ("vision_cfg", open_clip.CLIPVisionCfg),
        ("text_cfg", open_clip.CLIPTextCfg),
    ):
        allowed = {field.name for field in dataclasses.fields(schema)}
        _check_keys(config[section], allowed, name, section)
    for sizes in (config, config["vision_cfg"], config["text_cfg"]):
        _check_sizes(sizes, name)
    _check_patches(config["vision_cfg"], name)
    tower = config["vision_cfg"].get("timm_model_name")
    if tower and ":" not in tower and not timm.is_model(tower.split(".")[0]):
        close = difflib.get_close_matches(tower, timm.list_models(), n=3)
        raise UserError(
            f"timm_model_name ({tower}) of model {name} is unknown to timm; "
            f"close names: {', '.join(close) or 'none'}"
        )
    if config["text_cfg"].get("hf_model_name"):
        check_text_config(config, name)


def refuse_captioning(architecture: dict[str, Any], name: str) -> None:
    """Refuse CoCa, before anything of it is fetched."""
    if "multimodal_cfg" in architecture:
        raise UserError(
            f"model {name} is a captioning model (CoCa), whose decoder the contrastive loss cannot "
            "train; choose a model without multimodal_cfg"
        )


def _check_sizes(section: dict[str, Any], name: str) -> None:
    """Refuse sizes that are no whole numbers above 0, and a ratio that is none."""
    for key in _SIZES:
        value = section.get(key)
        sizes = value if isinstance(value, list | tuple) else [] if value is None else [value]
        for size in sizes:
            is_whole = isinstance(size, int) and not isinstance(size, bool)
            if not is_whole or not 0 < size <= _LARGEST_SIZE:
                raise UserError(
                    f"{key} ({str(value)[:60]}) of model {name} must be a whole number from 1 to "
                    f"{_LARGEST_SIZE}; correct its config"
                )
    ratio = section.get("mlp_ratio")
    if ratio is not None and not (isinstance(ratio, int | float) and 0 < ratio < _LARGEST_SIZE):
        raise UserError(f"mlp_ratio ({ratio}) of model {name} must be a number above 0")


def _check_patches(vision: dict[str, Any], name: str) -> None:
    """Refuse pictures smaller than a patch: the network would be built, and fail at a picture."""
    image, patch = vision.get("image_size"), vision.get("patch_size")
    if vision.get("timm_model_name") or isinstance(vision.get("layers"), list | tuple):
        patch = patch or 1 if vision.get("timm_model_name") else 32  # strides of a ResNet
    if image is None or patch is None:
        return
    sides = [min(size) if isinstance(size, list | tuple) else size for size in (image, patch)]
    if sides[0] < sides[1]:
        raise UserError(
            f"image_size ({image}) of model {name} must be at least its patch of {patch} pixels"
        )


def _check_keys(section: object, allowed: Iterable[str], name: str, where: str) -> None:
    if not isinstance(section, dict):
        raise UserError(f"{where} of model {name} must be an object, not {section!r}")
    allowed = sorted(allowed)
    for key in section:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=3) or allowed
            raise UserError(
                f"{key} is no setting of {where} of model {name}; did you mean {' or '.join(close)}"
            )
