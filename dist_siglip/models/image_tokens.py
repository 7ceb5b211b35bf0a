"""Image towers by their parts: patch tokens beside the pooled vector, and views of any size."""

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OwnVisionTransformer
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dist_siglip.errors import UserError
from dist_siglip.models.naflex import NaFlexTower


def require_image_tokens(visual: nn.Module) -> None:
    """Refuse an image tower that does not give its tokens behind the last norm.

    Raises:
        UserError: unless it is a VisionTransformer of timm or of open_clip, the latter without
            attention pooling.
    """
    tower = visual.trunk if isinstance(visual, TimmModel) else visual
    if isinstance(tower, OwnVisionTransformer) and tower.attn_pool is None:
        return
    if isinstance(visual, NaFlexTower):
        return
    if not isinstance(visual, TimmModel) or not isinstance(tower, VisionTransformer):
        raise UserError(
            f"the image tower ({type(tower).__name__}) gives no patch tokens; choose "
            "a ViT without attention pooling of open_clip's own, or one of timm, such as "
            "ViT-B-16-SigLIP"
        )


def pool_and_tokens(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pass pixels through an image tower by its parts; what its ``forward`` gives, and tokens."""
    if isinstance(visual, NaFlexTower):
        return visual.pool_and_tokens(pixels)
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        tokens = trunk.forward_features(pixels)
        return visual.head(trunk.forward_head(tokens)), tokens[:, trunk.num_prefix_tokens :]
    rows = visual.transformer(visual._embeds(pixels))
    pooled, tokens = visual._pool(rows)
    if visual.final_ln_after_pool:
        tokens = visual.ln_post(tokens)
    return pooled if visual.proj is None else pooled @ visual.proj, tokens


def project_tokens(visual: Any, tokens: Tensor) -> Tensor:
    """Pool and project each of (B, T, C) tokens as if it were the only one: (B, T, D)."""
    if not isinstance(visual, TimmModel):
        return tokens if visual.proj is None else tokens @ visual.proj
    trunk: Any = visual.trunk
    rows = tokens.flatten(0, 1)
    if trunk.attn_pool is not None:
        rows = trunk.attn_pool(rows[:, None])
    rows = visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(rows))))
    return rows.unflatten(0, tokens.shape[:2])


def patch_size_of(visual: Any) -> tuple[int, int]:
    """Return height and width of a patch in pixels."""
    tower = visual
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        tower = trunk.embeds if isinstance(visual, NaFlexTower) else trunk.patch_embed
    height, width = tower.patch_size
    return int(height), int(width)


def require_views(visual: nn.Module, who: str) -> int:
    """Refuse an image tower that ``encode_view`` cannot take apart; return the side of a patch.

    Args:
        visual: image tower.
        who: asks for views.

    Raises:
        UserError: unless it embeds square patches by one convolution, and drops none.
    """
    require_image_tokens(visual)
    is_timm = isinstance(visual, TimmModel)
    tower: Any = visual.trunk if is_timm else visual
    stem = getattr(tower, "patch_embed", None) if is_timm else tower
    if not isinstance(stem, PatchEmbed | OwnVisionTransformer):
        raise UserError(
            f"{who} needs an image tower that sees one size and embeds patches by one convolution, "
            f"and this one ({type(tower).__name__}) does not; choose a plain ViT, such as "
            "ViT-B-16-SigLIP"
        )
    dropout = tower.patch_drop if is_timm else tower.patch_dropout
    if not isinstance(dropout, nn.Identity):
        raise UserError(
            f"{who} needs every patch, and the image tower drops some in training; set "
            "model.patch_dropout to 0"
        )
    rows, columns = stem.patch_size
    if rows != columns:
        raise UserError(f"{who} needs square patches, and those here are {rows} x {columns}")
    return int(rows)


def pool_view(
    visual: Any, pixels: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pass pixels of any size through an image tower; see ``DualEncoder.encode_view``.

    Where the size is the tower's and nothing is hidden the tokens are those of its ``forward``.
    """
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        stem = trunk.patch_embed
        rows, grid = _patch_rows(stem.proj, pixels)
        rows = _hide(stem.norm(rows), mask, mask_token)
        prefix = [each for each in (trunk.cls_token, trunk.reg_token) if each is not None]
        before = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        positions = trunk.pos_embed
        if positions is not None:
            positions = _positions(positions, stem.grid_size, grid, before)
            if before == 0:
                rows = rows + positions
        rows = torch.cat([*(each.expand(len(rows), -1, -1) for each in prefix), rows], dim=1)
        if positions is not None and before:
            rows = rows + positions
        rows = trunk.norm_pre(trunk.pos_drop(rows))
        if trunk.grad_checkpointing:
            rows = checkpoint_seq(trunk.blocks, rows)
        else:
            rows = trunk.blocks(rows)
        tokens = trunk.norm(rows)
        pooled = trunk.forward_head(tokens, pre_logits=True)
        return pooled, tokens[:, trunk.num_prefix_tokens :]
    rows, grid = _patch_rows(visual.conv1, pixels)
    rows = _hide(rows, mask, mask_token)
    first = visual.class_embedding.to(rows).expand(len(rows), 1, -1)
    positions = _positions(visual.positional_embedding[None], visual.grid_size, grid, 1)
    rows = torch.cat([first, rows], dim=1) + positions.to(rows.dtype)
    pooled, tokens = visual._pool(visual.transformer(visual.ln_pre(rows)))
    return pooled, visual.ln_post(tokens) if visual.final_ln_after_pool else tokens


def _patch_rows(convolution: nn.Module, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """(B, T, C) of what patches embed to, and how many (rows, columns) of them there are."""
    found = convolution(pixels)
    return found.flatten(2).transpose(1, 2), (found.shape[2], found.shape[3])


def _hide(rows: Tensor, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
    if mask is None or mask_token is None:
        return rows
    return torch.where(mask[:, :, None], mask_token.to(rows.dtype), rows)


def _positions(
    positions: Tensor, own_grid: tuple[int, int], grid: tuple[int, int], before: int
) -> Tensor:
    """(1, before + T, C) positions for another grid, as timm resamples them."""
    if tuple(own_grid) == grid:
        return positions
    return resample_abs_pos_embed(
        positions, list(grid), old_size=list(own_grid), num_prefix_tokens=before
    )
