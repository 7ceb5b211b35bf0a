"""What are the classes called, and in which sentences do their names stand?

From open_clip's lists, from a file of the user's, or from the two files that CLIP_benchmark keeps
beside its shards. A template is text with ``{c}`` or ``{}`` where the name goes; nothing else in it
means anything, so a file of templates cannot ask for more.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from open_clip import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
)

from dist_siglip.data.samples.captions import split_lines
from dist_siglip.data.urls import is_remote
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import read_regular
from dist_siglip.system.yaml_text import MOST_BYTES, load_yaml

_CLASSES_FILE = "classnames.txt"
_TEMPLATES_FILE = "zeroshot_classification_templates.txt"
_PLACES = ("{c}", "{}")


def read_classes(given: str | list[str] | None, shards: Sequence[str]) -> list[str]:
    """Return the names of the classes, in the order of their labels.

    Args:
        given: "imagenet" for the 1000 names of open_clip; a list of names; a text file with a name
            a line; a YAML file, a list or a mapping with the list ``classes``. None: classnames.txt
            beside the shards or one folder above.
        shards: locations of the shards.

    Raises:
        UserError: if there are no names, fewer than two, or a file cannot be read.

    Example:
        >>> read_classes(["cat", "dog"], [])
        ['cat', 'dog']
        >>> len(read_classes("imagenet", []))
        1000
    """
    if given == "imagenet":
        return list(IMAGENET_CLASSNAMES)
    classes = _read(given, "classes", _CLASSES_FILE, '"imagenet"', shards)
    if len(classes) < 2 or not all(classes):
        raise UserError(f"classes ({len(classes)}) must be at least two names, none of them empty")
    return classes


def read_templates(given: str | list[str] | None, shards: Sequence[str]) -> list[str]:
    """Return the templates, each with a place for the name.

    Args:
        given: "openai" for the 80 templates of CLIP, "simple" for 7 of them, as open_clip has them;
            a list of templates; a text file with one a line; a YAML file, a list or a mapping
            with the list ``templates``. None: zeroshot_classification_templates.txt beside the
            shards or one folder above.
        shards: locations of the shards.

    Raises:
        UserError: if there is no template, one has no place for the name, or a file cannot be read.

    Example:
        >>> read_templates("simple", [])[0]
        'itap of a {c}.'
    """
    known = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    if isinstance(given, str) and given in known:
        return [template("{c}") for template in known[given]]
    templates = _read(given, "templates", _TEMPLATES_FILE, '"openai", "simple"', shards)
    for template in templates:
        if not any(place in template for place in _PLACES):
            raise UserError(
                f"template ({template!r}) must say where the name goes: {{c}} or {{}}, e.g. "
                "a photo of a {c}."
            )
    if not templates:
        raise UserError("templates ([]) must hold at least one, e.g. a photo of a {c}.")
    return templates


def fill(template: str, name: str) -> str:
    """Put the name of a class into a template.

    Example:
        >>> fill("a photo of a {c}.", "red fox"), fill("a {} in {0}.", "hen")
        ('a photo of a red fox.', 'a hen in {0}.')
    """
    for place in _PLACES:
        template = template.replace(place, name)
    return template


def _read(
    given: str | list[str] | None, what: str, beside: str, words: str, shards: Sequence[str]
) -> list[str]:
    """Return a list given as such, in a file, or beside the shards."""
    if isinstance(given, list):
        return given
    path = _beside(shards, beside) if given is None else Path(given)
    if path is None:
        raise UserError(
            f"{what} (null) are needed: there is no {beside} beside the shards; give {words}, a "
            "list, or a text or YAML file"
        )
    try:
        text = read_regular(path, MOST_BYTES).decode()
        if path.suffix not in (".yaml", ".yml"):
            return [line.strip() for line in split_lines(text.strip())]
        content: Any = load_yaml(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(
            f"{what} ({path}) cannot be read: {reason}; give {words}, a list, or a text or YAML "
            "file"
        ) from error
    found = content.get(what) if isinstance(content, dict) else content
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise UserError(
            f"{what} ({path}) must be a YAML list of strings, or a mapping with the list {what}"
        )
    return found


def _beside(shards: Sequence[str], name: str) -> Path | None:
    """Find a file in the folder of the first shard, or one above."""
    if not shards or is_remote(shards[0]):
        return None
    folder = Path(os.path.abspath(shards[0])).parent
    return next((p / name for p in (folder, folder.parent) if (p / name).is_file()), None)
