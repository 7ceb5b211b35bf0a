"""The content of a weights file, read without running code from it, and the towers in it.

Accepted: safetensors, one file or several with an index; ``torch.save`` files and checkpoint
folders that hold tensors and plain values only. Everything loaded as weights, from here or
elsewhere, goes through ``refuse_not_finite``.

A checkpoint is a table of tables. Somewhere in it are tensors whose names, without a prefix that
all of them share, are those of a dual encoder; a second such set is an average of the first
(``state_dict_ema``, ``model_ema.``), or what Lightning's averaging callbacks, ours too, call
``current_model_state`` beside the average that they put into ``state_dict``.
"""

import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.runs.checkpoints.selection import damage_of, has_checksum
from dist_siglip.runs.checkpoints.sharded import is_sharded, read_whole
from dist_siglip.system.regular_file import check_regular, read_json

logger = logging.getLogger(__name__)

# Names of tensors begin so, behind the prefix: in open_clip, transformers and MobileCLIP.
_IMAGE = re.compile(r"(?P<prefix>(?:.*?\.)?)(?:visual|vision_model|image_encoder)\.")
_TEXTS = (
    "text.",
    "token_embedding.",
    "positional_embedding",
    "transformer.",
    "text_model.",
    "text_encoder.",
)
_AVERAGE_WORDS = frozenset({"ema", "swa", "average", "averaged", "averaging", "avg", "shadow"})
_USUAL = "state_dict"
_UNAVERAGED = "current_model_state"
_OPTIMIZER = "optim"
_DEEPEST = 3


class FoundTowers(NamedTuple):
    """One set of towers in a checkpoint.

    Attributes:
        place: keys of the tables on the way to the tensors.
        prefix: what their names begin with.
        tensors: the whole table, names as they stand.
        is_average: whether it is an average over the weights of many steps.
    """

    place: tuple[str, ...]
    prefix: str
    tensors: dict[str, Tensor]
    is_average: bool

    def __str__(self) -> str:
        return "/".join((*self.place, f"{self.prefix}*"))


def choose_towers(content: Any, path: Path, average: bool | None) -> FoundTowers | None:
    """Find the towers in what was read from a file, and choose among several sets.

    Args:
        content: what the file holds.
        path: the file, for errors.
        average: True asks for an average, False for the weights it was made of; None for those the
            file itself puts first: the average in checkpoints of Lightning's averaging callbacks,
            else the weights.

    Returns:
        The set, or None if no table has names of both towers.

    Raises:
        UserError: If what ``average`` asks for is not there, or several sets are equally good.
    """
    found = list(_find(content))
    averages = [each for each in found if each.is_average]
    plain = [each for each in found if not each.is_average]
    if average is not None and not (averages if average else plain):
        has = "hold no average" if average else "hold nothing but an average"
        raise UserError(f"weights_average ({average}): weights {path} {has}; set it to null")
    prefers_average = _is_of_averaging_callback(content) if average is None else average
    first, second = (averages, plain) if prefers_average else (plain, averages)
    wanted = first or second
    usual = [each for each in wanted if each.place == (_USUAL,)]
    if len(usual) == 1:
        wanted = usual
    if not wanted:
        return None
    if len(wanted) > 1:
        names = ", ".join(map(str, wanted))
        raise UserError(
            f"weights {path} hold several pairs of towers ({names}); save the one you want alone"
        )
    (chosen,) = wanted
    if averages and plain:
        other = plain if chosen.is_average else averages
        value = str(not chosen.is_average).lower()
        logger.info(
            "weights %s: took %s; weights_average: %s takes %s", path, chosen, value, other[0]
        )
    return chosen


def _find(content: Any) -> Iterator[FoundTowers]:
    is_of_callback = _is_of_averaging_callback(content)
    for place, table in _tables(content, ()):
        tensors = {name.replace("_orig_mod.", ""): value for name, value in table.items()}
        matches = (_IMAGE.match(name) for name in tensors)
        for prefix in dict.fromkeys(match["prefix"] for match in matches if match):
            if not any(
                name.startswith(tuple(prefix + text for text in _TEXTS)) for name in tensors
            ):
                continue
            words = re.split(r"[._]", "_".join((*place, prefix)).lower())
            is_average = not _AVERAGE_WORDS.isdisjoint(words)
            if is_of_callback:
                is_average = place == (_USUAL,)
            yield FoundTowers(place, prefix, tensors, is_average)


def _tables(content: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Tables with tensors in them, outermost first."""
    if not isinstance(content, Mapping) or len(place) > _DEEPEST:
        return
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if tensors:
        yield place, tensors
    for key, value in content.items():
        if not str(key).startswith(_OPTIMIZER):  # its moments have the names of parameters
            yield from _tables(value, (*place, str(key)))


def _is_of_averaging_callback(content: Any) -> bool:
    return isinstance(content, Mapping) and _UNAVERAGED in content


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
