"""Read a weights file safely and put it into a network, or say why it does not fit.

Accepted: safetensors; ``torch.save`` files with tensors only (plain state dicts, open_clip
training checkpoints, checkpoints of this package). Files are read with ``weights_only=True`` or
safetensors, so a file that holds code is refused and its code never runs.
"""

import logging
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from safetensors import SafetensorError
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from dist_siglip.distributed.checkpoint_damage import damage_of, has_checksum
from dist_siglip.distributed.sharded_checkpoint import is_sharded, read_whole
from dist_siglip.errors import UserError
from dist_siglip.models.hugging_face_names import (
    has_flat_patches,
    is_foreign,
    to_own_names,
)
from dist_siglip.regular_file import check_regular, read_json

logger = logging.getLogger(__name__)

# Where a checkpoint of this package keeps its dual encoder, and that its open_clip network.
TOWERS_PREFIX = "towers."
NETWORK_PREFIX = "clip."
POSITIONS = (
    "visual.positional_embedding",
    "visual.trunk.pos_embed",
    "positional_embedding",
    "text.positional_embedding",
)
SHOWN_KEYS = 3
_LARGEST_LOG_SCALE = 20.0  # a scale of 5e8


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The content of a weights file.

    Args:
        towers: tensors by open_clip's names, without logit scale and bias.
        logit_scale: the file's multiplier (not its logarithm), or None if it has none.
        logit_bias: the file's bias, added to the logits, or None if it has none.
        global_batch_size: pairs of the global batch the file was trained with, or None if it
            does not say.
        interpolation: how image positions are resampled for another image size.
    """

    towers: dict[str, Tensor]
    logit_scale: float | None
    logit_bias: float | None
    global_batch_size: int | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


def read_weights(path: Path) -> Weights:
    """Read a weights file on the CPU, without running code from it.

    Raises:
        UserError: If the file is missing, damaged, holds code, or holds no state dict.
    """
    content = _read(path)
    global_batch_size = recorded_global_batch(content) if isinstance(content, Mapping) else None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no weights; give a file with a state dict")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path} is not a state dict (entry {key!r} is no tensor)")
    tensors = {key.replace("_orig_mod.", ""): value for key, value in content.items()}
    tensors = _strip_shared_prefix(tensors, "module.")
    if any(key.startswith(TOWERS_PREFIX) for key in tensors):
        return replace(_split_own_checkpoint(tensors, path), global_batch_size=global_batch_size)
    tensors = _strip_shared_prefix(tensors, NETWORK_PREFIX)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    log_scale = tensors.pop("logit_scale", None)
    bias = tensors.pop("logit_bias", None)
    if is_foreign(tensors):
        interpolation = "bilinear" if has_flat_patches(tensors) else "bicubic"
        tensors = to_own_names(tensors)
    return Weights(
        towers=tensors,
        interpolation=interpolation,
        logit_scale=None if log_scale is None else _scale(log_scale, "logit_scale", path),
        logit_bias=None if bias is None else _number(bias, "logit_bias", path),
        global_batch_size=global_batch_size,
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


def load_towers(network: nn.Module, weights: Weights, path: Path) -> None:
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
    for key, old_shape in _resize_positions(network, tensors, own, weights.interpolation):
        logger.info("resized %s of %s: %s -> %s", key, path, old_shape, tuple(own[key].shape))
    problems = _differences(own, tensors)
    if problems:
        raise UserError(
            f"weights {path} do not fit the model: {'; '.join(problems)}; "
            "name the model these weights were trained with"
        )
    network.load_state_dict(tensors, strict=False)


def _read(path: Path) -> Any:
    damage = damage_of(path) if is_sharded(path) or has_checksum(path) else None
    if damage is not None:
        raise UserError(f"weights {path} cannot be read ({damage}); use another checkpoint")
    if is_sharded(path):
        return read_whole(path)
    try:
        check_regular(path)
        if path.name.endswith(".safetensors.index.json"):
            return _read_shards(path)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"weights {path} do not exist; give the path of a weights file") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weights {path} hold more than tensors, or are damaged, and were not loaded, since "
            "they could run code; save the state dict alone, best as .safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"weights {path} cannot be read ({' '.join(str(error).split())[:120]}); the file is "
            "damaged or of another kind"
        ) from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the files an index of transformers lists, all of which lie beside it."""
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(n, str) for n in listed.values()):
        raise UserError(
            f"{index} must be an object with weight_map, the file of every tensor; fetch the model "
            "again"
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(listed.values())):
        path = index.parent / Path(name).name
        if not path.is_file():
            raise UserError(f"{index} lists {path.name}, which is missing; fetch the model again")
        tensors |= safetensors.torch.load_file(path, device="cpu")
    return tensors


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


def _strip_shared_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if all(key.startswith(prefix) for key in tensors):
        return {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


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
    # transformers stopped storing this buffer with version 4.31.
    tensors.pop("text.transformer.embeddings.position_ids", None)
    return tensors


def _resize_positions(
    network: nn.Module, tensors: dict[str, Tensor], own: dict[str, Tensor], interpolation: str
) -> list[tuple[str, tuple[int, ...]]]:
    """Resample position embeddings that differ in length only, in place.

    Returns:
        Names and old shapes of those that were resampled.
    """
    visual: Any = network.visual
    resized = []
    for key in POSITIONS:
        old = tensors.get(key)
        if old is None or key not in own or not _differ_in_length(old, own[key]):
            continue
        if key == "visual.trunk.pos_embed":
            num_prefix = 0 if visual.trunk.no_embed_class else visual.trunk.num_prefix_tokens
            if not _is_square(old.shape[1] - num_prefix):
                continue
            grid = list(visual.trunk.patch_embed.grid_size)
            tensors[key] = resample_abs_pos_embed(
                old, new_size=grid, num_prefix_tokens=num_prefix, interpolation=interpolation
            )
        elif key == "visual.positional_embedding":
            if not _is_square(old.shape[0] - 1):
                continue
            resize_pos_embed(tensors, network)
        else:
            resize_text_pos_embed(tensors, network)
        resized.append((key, tuple(old.shape)))
    return resized


def _differ_in_length(first: Tensor, second: Tensor) -> bool:
    """Whether two embeddings (L, C) or (1, L, C) have the same width and another length."""
    return (
        first.ndim == second.ndim
        and first.shape[-1] == second.shape[-1]
        and first.shape[-2] != second.shape[-2]
    )


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


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
