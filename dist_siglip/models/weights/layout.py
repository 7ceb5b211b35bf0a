"""The place of the towers inside of a checkpoint, whoever wrote it.

A checkpoint is a table of tables. Somewhere in it are tensors whose names, without a prefix that
all of them share, are those of a dual encoder; a second such set is an average of the first
(``state_dict_ema``, ``model_ema.``), or what Lightning's averaging callbacks, ours too, call
``current_model_state`` beside the average that they put into ``state_dict``.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dist_siglip.errors import UserError

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
