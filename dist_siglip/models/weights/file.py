"""The content of a weights file, read without running code from it.

Accepted: safetensors, one file or several with an index; ``torch.save`` files and checkpoint
folders that hold tensors and plain values only. Everything loaded as weights, from here or
elsewhere, goes through ``refuse_not_finite``.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.runs.checkpoints.checksum import damage_of, has_checksum
from dist_siglip.runs.checkpoints.sharded import is_sharded, read_whole
from dist_siglip.system.regular_file import check_regular, read_json


def read_content(path: Path) -> Any:
    """Read a weights file on the CPU.

    Raises:
        UserError: If the file is missing, damaged or holds code.
    """
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


def refuse_not_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are no numbers: one pass over each tensor.

    Args:
        tensors: by the names they have in the file.
        source: file they came from, for the error.

    Raises:
        UserError: If an entry is not-a-number or infinite; names the first such tensor, how many of
            its entries are so, and how many tensors.

    Example:
        >>> refuse_not_finite({"a": torch.ones(2), "b": torch.zeros(1)}, "weights.pt")
    """
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if not broken:
        return
    first = tensors[broken[0]]
    count = int((~first.float().isfinite()).sum())
    others = f", and so are {len(broken) - 1} more tensors" if len(broken) > 1 else ""
    raise UserError(
        f"{source}: {broken[0]} is not finite in {count} of {first.numel()} entries{others}; these "
        "weights are of a run that diverged, or damaged: use others"
    )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:  # float8 has no arithmetic
        tensor = tensor.float()
    # A sum needs no second tensor and is finite only if all entries are; it may overflow, too.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


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
