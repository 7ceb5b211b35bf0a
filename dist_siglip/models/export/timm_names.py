"""By which name does timm build this very image tower?

open_clip builds an image tower of timm by its name alone, at the size that belongs to the name;
width, depth and activation cannot be stated, and position embeddings are not resampled. So a
tower can be written for open_clip exactly if a name stands for it.
"""

from collections.abc import Iterator
from typing import Any

import timm
import torch
from open_clip.timm_model import TimmModel
from torch import nn

from dist_siglip.models.export.activation import activation_name


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
    # Towers with positions take pictures of one size only.
    yield getattr(trunk.patch_embed, "img_size", None) if hasattr(trunk, "patch_embed") else None
    for layer in trunk.modules():
        if hasattr(layer, "num_heads"):
            yield layer.num_heads
        if isinstance(layer, nn.LayerNorm):
            yield layer.eps
        if type(layer).__name__ in ("GELU", "GELUTanh", "QuickGELU"):
            yield activation_name(layer)
