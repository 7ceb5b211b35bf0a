"""Image towers that take pictures of any shape as patches (NaFlex), and their fixed counterparts.

The tower is timm's ``NaFlexVit`` with learned positions. What it computes is written here from its
parts: positions by weights of rows and columns in place of a resize for each shape in the batch, so
nothing waits for the device and ``torch.compile`` sees one graph; a mask of padded patches in every
attention and in the pooling; padded patches set to 0 before anything reads them.

A ViT of timm with attention pooling has the same weights under other names: a convolution that is a
matrix, positions in a row that are a grid. Its config and its weights turn into those of a NaFlex
tower and back.
"""

import math
from typing import Any

import timm
import torch
from open_clip.timm_model import TimmModel
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_siglip.data.samples.patches import (
    PatchBudget,
    is_packed,
    kernel_of,
    mask_of,
    pack_pictures,
    unpack,
)
from dist_siglip.errors import UserError
from dist_siglip.models.interop.transformers_format import (
    FIXED_TOWER,
    NAFLEX_TOWER,
    activation_name,
)

_NUM_PATCHES = 256  # where neither settings nor the files of a model say
_FIXED_STEM, _NAFLEX_STEM = "visual.trunk.patch_embed.", "visual.trunk.embeds."
_ROW_OF_POSITIONS, GRID_OF_POSITIONS = "visual.trunk.pos_embed", "visual.trunk.embeds.pos_embed"


class NaFlexTower(TimmModel):
    """An image tower of packed patches, in the place of open_clip's wrapper of a tower of timm.

    Args:
        visual: the wrapper, whose trunk and head are taken over.

    Raises:
        UserError: if the trunk has prefix tokens, other positions, or drops patches.
    """

    def __init__(self, visual: TimmModel) -> None:
        nn.Module.__init__(self)
        trunk: Any = visual.trunk
        embeds = trunk.embeds
        if (
            embeds.pos_embed is None
            or not embeds.is_linear
            or trunk.num_prefix_tokens
            or trunk.rope
        ):
            raise UserError(
                "a NaFlex tower needs one learned grid of positions and no tokens beside its "
                f"patches; choose one such as {NAFLEX_TOWER}"
            )
        if trunk.patch_drop is not None:
            raise UserError(
                "patch_dropout leaves out padding as well as patches where pictures have any shape "
                "(NaFlex); set it to 0"
            )
        self.trunk = trunk
        self.head = visual.head
        self.patch_size = int(embeds.patch_size[0])
        self.grid: tuple[int, int] = tuple(embeds.pos_embed.shape[1:3])
        self.image_size = tuple(side * self.patch_size for side in self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """Encode packed patches (B, 1 + N, 3 p^2), or pictures (B, 3, H, W), to (B, D)."""
        return self.pool_and_tokens(x)[0]

    def pool_and_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode packed patches, or pictures whose sides are multiples of a patch.

        Args:
            images: normalised floats.

        Returns:
            (B, D) pooled; (B, N, C) tokens behind the last norm. What stands where ``patch_mask``
            is False has no meaning, but is finite.
        """
        packed = images if is_packed(images) else pack_pictures(images, self.patch_size)
        return self.read_patches(*unpack(packed))

    def read_patches(self, patches: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
        """Encode patches (B, N, 3 p^2) of pictures with rows and columns (B, 2) int64, likewise."""
        mask = mask_of(shapes, patches.shape[1])
        trunk: Any = self.trunk
        embeds = trunk.embeds
        # What padding holds must not reach anything: 0 * nan is nan.
        rows = embeds.norm(embeds.proj(torch.where(mask[..., None], patches, 0)))
        positions = resized_positions(embeds.pos_embed, shapes, rows.shape[1])
        rows = rows + positions.to(embeds.pos_embed.dtype)
        rows = trunk.norm_pre(embeds.pos_drop(rows))
        bias = torch.zeros_like(mask, dtype=rows.dtype).masked_fill(~mask, float("-inf"))
        bias = bias[:, None, None]
        for block in trunk.blocks:
            if trunk.grad_checkpointing and torch.is_grad_enabled():
                rows = checkpoint(block, rows, attn_mask=bias, use_reentrant=False)
            else:
                rows = block(rows, attn_mask=bias)
        tokens: Tensor = trunk.norm(rows)
        pooled: Tensor = self.head(trunk.forward_head(tokens, patch_valid=mask))
        return pooled, tokens


def resized_positions(grid: Tensor, shapes: Tensor, num_patches: int) -> Tensor:
    """Resize a grid of positions to the shape of each picture, bilinearly with anti-aliasing.

    Row r of R is the mean of the grid's G rows u, weighed by max(0, 1 - |u + .5 - (r + .5) s| /
    max(s, 1)), s = G / R; columns alike. A grid resized to its own size is itself, to the bit.

    Args:
        grid: (1, G, H, C).
        shapes: (B, 2) int64, rows and columns of each picture.
        num_patches: N, places of each picture, row by row; those behind its last take its last row.

    Returns:
        (B, N, C) float32, or float64 for a grid of it, whatever autocast says.

    Source:
        ``torch.nn.functional.interpolate`` (bilinear, antialias), as big_vision and transformers
        resize positions.
    """
    with torch.autocast(grid.device.type, enabled=False):
        table = grid[0].to(torch.promote_types(grid.dtype, torch.float32))
        sizes = shapes.clamp(min=1)
        places = torch.arange(num_patches, device=grid.device)
        columns = sizes[:, 1:]
        at = torch.stack([places // columns, places % columns], dim=-1).minimum(sizes[:, None] - 1)
        sides = [
            _axis_weights(at[..., axis], sizes[:, axis : axis + 1], table.shape[axis], table.dtype)
            for axis in (0, 1)
        ]
        weights = (sides[0][..., :, None] * sides[1][..., None, :]).flatten(-2)
        return weights @ table.flatten(0, 1)


def _axis_weights(at: Tensor, size: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B, N, length) weights of the places of one axis in a table of it."""
    scale = length / size.to(dtype)
    centre = (at + 0.5) * scale
    middles = torch.arange(length, device=at.device) + 0.5
    distance = (middles - centre[..., None]).abs() / scale.clamp(min=1)[..., None]
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


def budget_of(network: nn.Module, num_patches: int | None) -> PatchBudget | None:
    """Return what the image tower of an open_clip network takes; None if it is no NaFlex tower."""
    visual: Any = network.visual
    if not isinstance(visual, NaFlexTower):
        return None
    return PatchBudget(
        visual.patch_size, _NUM_PATCHES if num_patches is None else num_patches
    ).check()


def is_naflex(architecture: dict[str, Any]) -> bool:
    """Whether a model config is of a NaFlex tower, by the name of timm's tower."""
    return str(architecture["vision_cfg"].get("timm_model_name") or "").startswith("naflexvit")


def change_form(architecture: dict[str, Any], name: str, *, setting: str) -> dict[str, Any]:
    """Turn the config of a NaFlex tower into that of a fixed one, or the other way round.

    Args:
        architecture: open_clip's model config; not changed.
        name: of the model, for errors.
        setting: that asks for it, with its value, for errors.

    Raises:
        UserError: if the image tower is none of timm with attention pooling over patches alone.
    """
    vision = dict(architecture["vision_cfg"])
    wanted = FIXED_TOWER if is_naflex(architecture) else NAFLEX_TOWER
    tower = vision.get("timm_model_name")
    if "width" not in vision:
        trunk = None
        if tower and timm.is_model(tower.split(".")[0]):
            with torch.device("meta"):
                trunk = timm.create_model(tower, num_classes=0)
        if not isinstance(trunk, VisionTransformer | NaFlexVit) or trunk.attn_pool is None:
            raise _no_other_form(setting, name, tower)
        vision |= _sizes(trunk)
    elif "siglip" not in str(tower):
        raise _no_other_form(setting, name, tower)
    vision["timm_model_name"] = wanted
    vision.setdefault("image_size", 224)
    vision.pop("timm_model_pretrained", None)
    return {**architecture, "vision_cfg": vision}


def _no_other_form(setting: str, name: str, tower: str | None) -> UserError:
    return UserError(
        f"{setting} needs a ViT of timm with attention pooling, such as that of ViT-B-16-SigLIP2; "
        f"the image tower of {name} is {tower or 'of open_clip'}"
    )


def _sizes(trunk: Any) -> dict[str, Any]:
    """Sizes of a trunk, as a config of ours states them."""
    block = trunk.blocks[0]
    width, inner = trunk.embed_dim, block.mlp.fc1.out_features
    embed = trunk.embeds if isinstance(trunk, NaFlexVit) else trunk.patch_embed
    with torch.device("cpu"):
        is_tanh = activation_name(block.mlp.act) == "gelu_pytorch_tanh"
    return {
        "width": width,
        "layers": len(trunk.blocks),
        "head_width": width // block.attn.num_heads,
        "mlp_ratio": inner / width
        if int(width * (inner / width)) == inner
        else (inner + 0.5) / width,
        "patch_size": embed.patch_size[0],
        "norm_kwargs": {"eps": block.norm1.eps},
        **({"act_kwargs": {"approximate": "tanh"}} if is_tanh else {}),
    }


def to_form_of(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give weights the names and shapes of the form of image tower that a network has.

    Those of a fixed tower become those of a NaFlex tower, or the other way round; others stay.
    """
    visual: Any = network.visual
    if isinstance(visual, NaFlexTower):
        return to_naflex_names(tensors, visual.grid)
    return to_fixed_names(tensors) if isinstance(visual, TimmModel) else tensors


def to_naflex_names(tensors: dict[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Rename weights of a fixed tower; those of a NaFlex tower stay.

    Args:
        tensors: by open_clip's names.
        grid: of the NaFlex tower. As many positions have its rows and columns, others are a square.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == _ROW_OF_POSITIONS:
            number, side = value.shape[1], math.isqrt(value.shape[1])
            own = grid if number == grid[0] * grid[1] else (side, side)
            is_grid = number == own[0] * own[1]
            found[GRID_OF_POSITIONS if is_grid else name] = (
                value.unflatten(1, own) if is_grid else value
            )
        elif name.startswith(_FIXED_STEM):
            is_kernel = value.ndim == 4
            changed = value.permute(0, 2, 3, 1).flatten(1) if is_kernel else value
            found[_NAFLEX_STEM + name.removeprefix(_FIXED_STEM)] = changed
        else:
            found[name] = value
    return found


def to_fixed_names(tensors: dict[str, Tensor], *, flat_patches: bool = False) -> dict[str, Tensor]:
    """Rename weights of a NaFlex tower; those of a fixed one stay.

    Args:
        tensors: by open_clip's names.
        flat_patches: leave the matrix of patches one, as ``Siglip2Model`` has it.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == GRID_OF_POSITIONS:
            found[_ROW_OF_POSITIONS] = value.flatten(1, 2)
        elif name.startswith(_NAFLEX_STEM):
            if value.ndim == 2 and not flat_patches:
                value = kernel_of(value)
            found[_FIXED_STEM + name.removeprefix(_NAFLEX_STEM)] = value
        else:
            found[name] = value
    return found
