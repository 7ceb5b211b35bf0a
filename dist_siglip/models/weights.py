"""Weights of a file put into a network, position embeddings resampled where sizes differ.

Image positions are resampled over the grid: of open_clip's weights as open_clip does, of those of
transformers as ``interpolate_pos_encoding`` does. Text positions are stretched, all of them as
open_clip does, or only those behind the first few (Long-CLIP), which stay as they are.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from dist_siglip.errors import UserError
from dist_siglip.models.interop.transformers_format import (
    has_flat_patches,
    is_foreign,
    to_own_names,
)
from dist_siglip.models.naflex import GRID_OF_POSITIONS, resized_positions, to_form_of
from dist_siglip.models.weights_file import choose_towers, read_content, refuse_not_finite

logger = logging.getLogger(__name__)

_IMAGE_GRID = "visual.positional_embedding"
_TIMM_GRID = "visual.trunk.pos_embed"
_IMAGE_POSITIONS = (_IMAGE_GRID, _TIMM_GRID)
_TIMM_KERNEL = "visual.trunk.patch_embed.proj.weight"
# What depends on how a picture is cut into patches.
OF_THE_GRID = (*_IMAGE_POSITIONS, GRID_OF_POSITIONS, _TIMM_KERNEL)
_TEXTS = ("positional_embedding", "text.positional_embedding")
# Where a checkpoint of this package keeps its dual encoder, and that its open_clip network.
TOWERS_PREFIX = "towers."
NETWORK_PREFIX = "clip."
SHOWN_KEYS = 3
_LARGEST_LOG_SCALE = 20.0  # a scale of 5e8


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
    own: Mapping[str, Tensor],
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
    for key in (*_IMAGE_POSITIONS, GRID_OF_POSITIONS, *_TEXTS):
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
        elif key == GRID_OF_POSITIONS:
            rows, columns = own[key].shape[1:3]
            every = resized_positions(old, torch.tensor([[rows, columns]]), rows * columns)
            tensors[key] = every.unflatten(1, (rows, columns)).to(old.dtype)
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
    """Whether two embeddings (L, C), (1, L, C) or grids have the same width and other places."""
    return (
        first.ndim == second.ndim
        and first.shape[-1] == second.shape[-1]
        and first.shape[:-1] != second.shape[:-1]
    )


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


_OF_OPEN_CLIP = ImageResampling("bicubic", antialias=True)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The content of a weights file.

    Args:
        towers: tensors by open_clip's names, without logit scale and bias.
        logit_scale: the file's multiplier (not its logarithm), or None if it has none.
        logit_bias: the file's bias, added to the logits, or None if it has none.
        global_batch_size: pairs of the global batch the file was trained with, or None if it
            does not say.
        global_step: optimizer steps behind the file, or None if it does not say.
        resampling: how image positions are resampled for another image size.
    """

    towers: dict[str, Tensor]
    logit_scale: float | None
    logit_bias: float | None
    global_batch_size: int | None = None
    global_step: int | None = None
    resampling: ImageResampling = _OF_OPEN_CLIP


def is_of_another_grid(network: Any, name: str, before: torch.Size, now: torch.Size) -> bool:
    """Whether ``resample_for_grid`` can bring one of ``OF_THE_GRID`` to the shape in a network.

    Args:
        network: open_clip's.
        name: as in the network.
        before: shape it has.
        now: shape it is to have.
    """
    if name == _TIMM_KERNEL:
        return len(before) == len(now) and before[:2] == now[:2]
    if name == GRID_OF_POSITIONS:
        return len(before) == len(now) and before[-1] == now[-1]
    is_longer = before[-1:] == now[-1:] and before[:-2] == now[:-2]
    visual = network.visual
    grid = visual.grid_size if name == _IMAGE_GRID else visual.trunk.patch_embed.grid_size
    return is_longer and _is_square(before[-2] - (now[-2] - math.prod(grid)))


def resample_for_grid(network: nn.Module, name: str, old: Tensor, path: Path) -> Tensor:
    """Bring one of ``OF_THE_GRID`` to another size: positions as open_clip, a kernel as FlexiViT.

    The grid of a NaFlex tower is resized as that tower does it for each picture.

    Source:
        Beyer et al. 2023 (FlexiViT), arXiv:2212.08013, section 3.4, for kernels: products with
        patches that are enlarged alike stay the same.
    """
    own = network.get_parameter(name)
    if name == _TIMM_KERNEL:
        logger.info("resized %s of %s: %s -> %s", name, path, tuple(old.shape), tuple(own.shape))
        return resample_patch_embed(old, list(own.shape[-2:]))
    tensors, wanted = {name: old}, {name: own}
    resize_positions(network, tensors, wanted, path, resampling=_OF_OPEN_CLIP, kept_positions=0)
    return tensors[name]


def read_weights(path: Path, *, average: bool | None = None) -> Weights:
    """Read a weights file on the CPU, without running code from it.

    A prefix that the names of both towers share is taken off, whatever it is; what lies beside the
    towers is left out, and named in the log.

    Args:
        path: the file; of a sharded checkpoint the folder.
        average: True takes an average of the weights, False the weights it was made of, None what
            the file puts first; see ``choose_towers``.

    Raises:
        UserError: If the file is missing, damaged, holds code, holds no state dict or several,
            lacks what ``average`` asks for, or has an entry that is not finite.
    """
    content = read_content(path)
    said = content if isinstance(content, Mapping) else {}
    step = said.get("global_step")
    history: dict[str, Any] = {
        "global_batch_size": recorded_global_batch(said),
        "global_step": step if isinstance(step, int) else None,
    }
    found = choose_towers(content, path, average)
    own_prefix = TOWERS_PREFIX + NETWORK_PREFIX
    if found is None:
        tensors = _only_state_dict(content, path)
        prefix = own_prefix if any(name.startswith(TOWERS_PREFIX) for name in tensors) else ""
    else:
        prefix, tensors = found.prefix, found.tensors
    if prefix.endswith(own_prefix):
        tensors = _below(tensors, prefix.removesuffix(own_prefix))
        refuse_not_finite(tensors, str(path))
        return replace(_split_own_checkpoint(tensors, path), **history)
    _name_left_out([name for name in tensors if not name.startswith(prefix)], prefix, path)
    refuse_not_finite({k: v for k, v in tensors.items() if k.startswith(prefix)}, str(path))
    tensors = _below(tensors, prefix)
    resampling = _OF_OPEN_CLIP
    log_scale = tensors.pop("logit_scale", None)
    bias = tensors.pop("logit_bias", None)
    if is_foreign(tensors):
        is_naflex = has_flat_patches(tensors)
        resampling = ImageResampling("bilinear" if is_naflex else "bicubic", antialias=is_naflex)
        tensors = to_own_names(tensors)
    return Weights(
        towers=tensors,
        resampling=resampling,
        logit_scale=None if log_scale is None else _scale(log_scale, "logit_scale", path),
        logit_bias=None if bias is None else _number(bias, "logit_bias", path),
        **history,
    )


def recorded_global_batch(checkpoint: Mapping[str, Any]) -> int | None:
    """Find the global batch a checkpoint was trained with: at its top level, or in its data state.

    Example:
        >>> recorded_global_batch({"state_dict": {}, "data": {"global_batch_size": 256}})
        256
    """
    for part in (checkpoint, *checkpoint.values()):
        if isinstance(part, Mapping) and isinstance(part.get("global_batch_size"), int):
            return int(part["global_batch_size"])
    return None


def load_towers(
    network: nn.Module, weights: Weights, path: Path, *, kept_positions: int = 0
) -> None:
    """Copy the tensors of a file into an open_clip network, in place.

    Position embeddings of another image size or context length are resampled, and named in the
    log. Everything else must fit exactly. Logit scale and bias of the network are left alone.

    Raises:
        UserError: If a tensor is missing, unexpected or of another shape; the text names the
            first few of each kind, their numbers and the file. The network is then unchanged.
    """
    own = {
        key: value
        for key, value in network.state_dict().items()
        if key not in ("logit_scale", "logit_bias")
    }
    tensors = _to_current_names(network, dict(weights.towers))
    resize_positions(
        network,
        tensors,
        own,
        path,
        resampling=weights.resampling,
        kept_positions=kept_positions,
    )
    problems = _differences(own, tensors)
    if problems:
        raise UserError(
            f"weights {path} do not fit the model: {'; '.join(problems)}; "
            "name the model these weights were trained with"
        )
    network.load_state_dict(tensors, strict=False)


def _only_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a file without the names of both towers, to be reported by ``load_towers``."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no weights; give a file with a state dict")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path} is not a state dict (entry {key!r} is no tensor)")
    return dict(content)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _name_left_out(names: list[str], prefix: str, path: Path) -> None:
    if names:
        logger.warning(
            "weights %s: the towers are %s*; left out %d tensors beside them (%s)",
            path,
            prefix,
            len(names),
            _first(names),
        )


def _number(tensor: Tensor, name: str, path: Path) -> float:
    if tensor.numel() != 1:
        raise UserError(
            f"{name} {tuple(tensor.shape)} of weights {path} must be one number; the file is "
            "damaged or of another kind"
        )
    return float(tensor.item())


def _scale(log_scale: Tensor, name: str, path: Path) -> float:
    """The multiplier, from its logarithm."""
    number = _number(log_scale, name, path)
    if number > _LARGEST_LOG_SCALE:
        raise UserError(
            f"{name} ({number:g}) of weights {path} must be the logarithm of the scale, at most "
            f"{_LARGEST_LOG_SCALE:g}; take the logarithm of the multiplier"
        )
    return math.exp(number)


def _split_own_checkpoint(tensors: dict[str, Tensor], path: Path) -> Weights:
    """Take the towers, and the scale and bias of either parameterisation, from our checkpoint."""
    towers: dict[str, Tensor] = {}
    scalars: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.startswith(TOWERS_PREFIX):
            towers[key.removeprefix(TOWERS_PREFIX).removeprefix(NETWORK_PREFIX)] = value
        elif value.numel() == 1:
            scalars[key.rsplit(".", 1)[-1]] = value
    scale = _scale(scalars["log_scale"], "log_scale", path) if "log_scale" in scalars else None
    bias = float(scalars["logit_bias"].item()) if "logit_bias" in scalars else None
    if bias is None and scale is not None and "relative_bias" in scalars:
        bias = -scale * float(scalars["relative_bias"].item())
    return Weights(towers=towers, logit_scale=scale, logit_bias=bias)


def _to_current_names(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename what older or foreign open_clip checkpoints call differently."""
    try:
        tensors = convert_state_dict(network, tensors)
    except (AttributeError, KeyError):
        # A MobileCLIP file for another network: left as it is, its names are reported later.
        logger.debug("the weights are of MobileCLIP, the network is not", exc_info=True)
    if "positional_embedding" in tensors and not hasattr(network, "positional_embedding"):
        tensors = convert_to_custom_text_state_dict(tensors)
    tensors = to_form_of(network, tensors)
    # transformers stopped storing this buffer with version 4.31.
    tensors.pop("text.transformer.embeddings.position_ids", None)
    return tensors


def _differences(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    reshaped = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds if keys]


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN_KEYS]) + (", ..." if len(keys) > SHOWN_KEYS else "")
