"""Position embeddings of weights for another image size or another context length.

Image positions are resampled over the grid: of open_clip's weights as open_clip does, of those of
transformers as ``interpolate_pos_encoding`` does. Text positions are stretched, all of them as
open_clip does, or only those behind the first few (Long-CLIP), which stay as they are.
"""

import logging
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from dist_siglip.errors import UserError

logger = logging.getLogger(__name__)

_IMAGE_GRID = "visual.positional_embedding"
_TIMM_GRID = "visual.trunk.pos_embed"
_TEXTS = ("positional_embedding", "text.positional_embedding")


class ImageResampling(NamedTuple):
    """How a grid of image positions becomes one of another size.

    Attributes:
        interpolation: between the old positions.
        antialias: whether a filter of the new spacing is applied (it changes enlarged grids too).
    """

    interpolation: Literal["bicubic", "bilinear"]
    antialias: bool


def resize_positions(
    network: nn.Module,
    tensors: dict[str, Tensor],
    own: dict[str, Tensor],
    path: Path,
    *,
    resampling: ImageResampling,
    kept_positions: int,
) -> None:
    """Resample position embeddings that differ in length only, in place, and name them in the log.

    Args:
        network: open_clip's network that ``tensors`` go into.
        tensors: of a file, by the names of the network; changed.
        own: state of the network.
        path: the file, for the log.
        resampling: of image positions.
        kept_positions: first text positions that stay as they are, >= 0.

    Raises:
        UserError: If more positions are to be kept than there are.
    """
    visual: Any = network.visual
    for key in (_IMAGE_GRID, _TIMM_GRID, *_TEXTS):
        old = tensors.get(key)
        if old is None or key not in own or not _differ_in_length(old, own[key]):
            continue
        said = ""
        if key == _TIMM_GRID:
            num_prefix = 0 if visual.trunk.no_embed_class else visual.trunk.num_prefix_tokens
            if not _is_square(old.shape[1] - num_prefix):
                continue
            tensors[key] = resample_abs_pos_embed(
                old,
                new_size=list(visual.trunk.patch_embed.grid_size),
                num_prefix_tokens=num_prefix,
                **resampling._asdict(),
            )
        elif key == _IMAGE_GRID:
            if not _is_square(old.shape[0] - 1):
                continue
            resize_pos_embed(tensors, network, **resampling._asdict())
        elif kept_positions:
            tensors[key] = stretch_positions(old, own[key].shape[0], kept_positions)
            said = f"; the first {kept_positions} stay, {_who_moves(network, kept_positions)}"
        else:
            resize_text_pos_embed(tensors, network)
            said = "; features of short captions move too, unless model.kept_positions keeps theirs"
        sizes = f"{tuple(old.shape)} -> {tuple(own[key].shape)}"
        logger.info("resized %s of %s: %s%s", key, path, sizes, said)


def stretch_positions(old: Tensor, length: int, kept: int) -> Tensor:
    """Stretch (L, C) position embeddings to (length, C), but for the first ones.

    With s = (length - kept) / (L - kept), new row i >= kept lies at kept + (i - kept) / s among the
    old rows: between two rows linearly, behind the last one on the line through the last two. Rows
    i < kept are the old ones.

    Args:
        old: (L, C).
        length: rows wanted, > kept.
        kept: first rows that stay, >= 0 and < L.

    Raises:
        UserError: If ``kept`` is out of range.

    Example:
        >>> stretch_positions(torch.tensor([[0.0], [10.0], [20.0]]), 5, 1).flatten().tolist()
        [0.0, 10.0, 15.0, 20.0, 25.0]

    Source:
        Zhang et al. 2024 (Long-CLIP), arXiv:2403.15378, section 3.2: kept = 20, 77 to 248 rows.
    """
    most = min(old.shape[0], length)
    if not 0 <= kept < most:
        raise UserError(
            f"kept_positions ({kept}) must be at least 0 and below {most}, the smaller of the old "
            f"and the new context length ({old.shape[0]}, {length}); Long-CLIP keeps 20 of 77"
        )
    rows = old.double()
    step = (old.shape[0] - kept) / (length - kept)
    places = kept + step * torch.arange(length - kept, dtype=rows.dtype)
    lower = places.floor().long().clamp(max=max(old.shape[0] - 2, 0))
    upper = (lower + 1).clamp(max=old.shape[0] - 1)
    share = (places - lower)[:, None]
    stretched = rows[lower] + share * (rows[upper] - rows[lower])
    return torch.cat([rows[:kept], stretched]).to(old.dtype)


def _who_moves(network: Any, kept: int) -> str:
    """Which captions keep their features, in words."""
    text = getattr(network, "text", network)
    pool = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", "")
    if getattr(text, "attn_mask", None) is not None and pool in ("argmax", "eos"):
        return f"and with them the features of captions of up to {kept} tokens"
    return "but this text tower reads its padding too: features of all captions move"


def _differ_in_length(first: Tensor, second: Tensor) -> bool:
    """Whether two embeddings (L, C) or (1, L, C) have the same width and another length."""
    return (
        first.ndim == second.ndim
        and first.shape[-1] == second.shape[-1]
        and first.shape[-2] != second.shape[-2]
    )


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
