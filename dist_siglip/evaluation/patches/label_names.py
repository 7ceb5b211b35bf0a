"""Which labels of masks are classes, and what these are called."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from dist_siglip.data.samples.captions import split_lines
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import read_regular
from dist_siglip.system.yaml_text import MOST_BYTES, load_yaml

NO_CLASS = -1
UNKNOWN = -2
_NUM_LABELS = 2**16
_IGNORED = 255
_MOST_CLASSES = 4096
_VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant"),
    *("sheep", "sofa", "train", "tv monitor"),
)
_ADE_CLASSES = "objectInfo150.txt"
_CLASS_FILES = ("classes.json", "classes.yaml", "classes.txt", _ADE_CLASSES)


class LabelNames(NamedTuple):
    """Which labels of masks are classes.

    Attributes:
        by_label: name of each label that is a class.
        ignored: labels of pixels that count nowhere.
    """

    by_label: dict[int, str]
    ignored: frozenset[int]

    @property
    def names(self) -> list[str]:
        """Names of the K classes, by rising label; class k is the k-th of them."""
        return [self.by_label[label] for label in sorted(self.by_label)]

    def table(self) -> NDArray[np.int16]:
        """Class of every possible label, or that it is ignored or unknown: (65536,)."""
        found = np.full(_NUM_LABELS, UNKNOWN, dtype=np.int16)
        for number, label in enumerate(sorted(self.by_label)):
            found[label] = number
        found[sorted(self.ignored)] = NO_CLASS
        return found


def read_label_names(
    classes: str | list[str] | None,
    ignore: Sequence[int] | None,
    folder: Path,
    *,
    is_voc: bool = False,
) -> LabelNames:
    """Read which labels are classes, and what they are called.

    Args:
        classes: names of the labels 0, 1, ... in a list, in a text file with one a line, or in a
            JSON or YAML file with such a list or an object {label: name}; ADE20k's
            objectInfo150.txt names 1 to 150. None: one of these files in the folder (classes.json,
            classes.yaml, classes.txt, objectInfo150.txt), else, in Pascal VOC's layout, its 21.
        ignore: labels of pixels that count nowhere. None: 255, and 0 with objectInfo150.txt, where
            it is what has none of the names.
        folder: where to look for a file.
        is_voc: whether the folder is one of Pascal VOC.

    Raises:
        UserError: if there are no names, fewer than two, or labels are none.

    Example:
        >>> read_label_names(["paper", "ink"], None, Path()).names
        ['paper', 'ink']
    """
    ignored = frozenset({_IGNORED} if ignore is None else ignore)
    by_label: Mapping[int, str]
    if isinstance(classes, list):
        by_label = dict(enumerate(classes))
    else:
        beside = (folder / name for name in _CLASS_FILES)
        path = next((p for p in beside if p.is_file()), None) if classes is None else Path(classes)
        if path is not None:
            by_label = _names_in(path)
            if ignore is None and path.name == _ADE_CLASSES:
                ignored |= {0}
        elif is_voc:
            by_label = dict(enumerate(_VOC_CLASSES))
        else:
            raise UserError(
                f"classes (null) are needed: there is no {', '.join(_CLASS_FILES)} in {folder}; "
                "give a list of names, or a text, JSON or YAML file"
            )
    named = {label: name for label, name in by_label.items() if label not in ignored}
    for label in (*named, *ignored):
        if not 0 <= label < _NUM_LABELS:
            raise UserError(
                f"label ({label}) of a class or in ignore must be 0 to {_NUM_LABELS - 1}"
            )
    if not 2 <= len(named) <= _MOST_CLASSES or not all(named.values()):
        raise UserError(
            f"classes ({len(named)} beside ignored ones) must be 2 to {_MOST_CLASSES} names, none "
            "of them empty"
        )
    return LabelNames(named, ignored)


def _names_in(path: Path) -> dict[int, str]:
    """Read names by label from a file."""
    try:
        text = read_regular(path, MOST_BYTES).decode()
        if path.suffix not in (".json", ".yaml", ".yml"):
            lines = [line.strip() for line in split_lines(text.strip())]
            if lines and lines[0].split("\t")[0].strip() == "Idx":  # ADE20k: Idx Ratio ... Name
                cells = [line.split("\t") for line in lines[1:]]
                return {int(row[0]): row[-1].split(",")[0].strip() for row in cells}
            return dict(enumerate(lines))
        content = json.loads(text) if path.suffix == ".json" else load_yaml(text)
        if isinstance(content, dict) and "classes" in content:
            content = content["classes"]
        if isinstance(content, list):
            content = dict(enumerate(content))
        if isinstance(content, dict) and all(isinstance(each, str) for each in content.values()):
            return {int(label): name for label, name in content.items()}
        reason = "it holds neither a list of names nor an object {label: name}"
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    raise UserError(
        f"classes ({path}) cannot be read: {reason}; give a list of names, or a text, JSON or YAML "
        "file"
    )
