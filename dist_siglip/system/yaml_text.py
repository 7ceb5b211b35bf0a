"""Bounded reading of YAML, which refuses repeated keys.

YAML lets a text of some hundred bytes stand for billions of values, by aliases of values that hold
other aliases, and lets the second of two equal keys win silently. Both are refused in one pass over
the events of the parser.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

MOST_BYTES = 16 * 2**20
_MOST_DEPTH = 64
_MOST_REPEATED = 10_000
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RefusedYamlError(yaml.YAMLError):
    """A text that could be read and must not be; says why in one line."""


@dataclass
class _Level:
    """A list or a mapping that is being read.

    Attributes:
        is_mapping: whether it has keys.
        anchor: its name, if it has one.
        size: values in it so far, those in its parts included.
        lines: the line of each key so far.
        key: the newest key, while its value is awaited.
    """

    is_mapping: bool
    anchor: str | None
    size: int = 1
    lines: dict[Hashable, int] = field(default_factory=dict)
    key: str | None = None


def load_yaml(text: str) -> Any:
    """Return what a YAML text says, in plain values.

    Raises:
        yaml.YAMLError: if it is no YAML, or ``check_yaml`` refuses it.

    Example:
        >>> load_yaml("data: {seed: 1}")
        {'data': {'seed': 1}}
    """
    with naming_values():
        check_yaml(text)
        return yaml.load(text, Loader=_LOADER)


@contextmanager
def naming_values() -> Iterator[None]:
    """Make what a loader raises for a value that is not what it looks like a ``YAMLError``.

    Such as a month 99, a number of 5,000 digits, or half a character.
    """
    try:
        yield
    except yaml.YAMLError:
        raise
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise yaml.YAMLError(f"a value cannot be read ({reason})") from error


def check_yaml(text: str) -> None:
    """Refuse a text that names a key twice, is nested too deeply, or repeats too much by name.

    Raises:
        yaml.YAMLError: if it is no YAML.
        RefusedYamlError: naming key and lines, or the bound.

    Example:
        >>> check_yaml("a: {b: 1, c: 2, b: 3}")
        Traceback (most recent call last):
            ...
        dist_siglip...RefusedYamlError: key a.b stands twice (lines 1 and 1); keep one
    """
    levels: list[_Level] = []
    sizes: dict[str, int] = {}
    repeated = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionEndEvent):
            done = levels.pop()
            if done.anchor is not None:
                sizes[done.anchor] = done.size
            _count(levels, done.size)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(levels) == _MOST_DEPTH:
                raise RefusedYamlError(f"it is nested deeper than {_MOST_DEPTH} levels")
            levels.append(_Level(isinstance(event, yaml.MappingStartEvent), event.anchor))
            if event.anchor is not None:
                sizes.pop(event.anchor, None)
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(str(event.anchor))
            if size is None:
                raise RefusedYamlError(f"*{event.anchor} names nothing that ends before it")
            repeated += size
            if repeated > _MOST_REPEATED:
                raise RefusedYamlError(f"it repeats more than {_MOST_REPEATED:,} values by name")
            _count(levels, size)
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if levels and levels[-1].is_mapping and levels[-1].key is None:
                _note_key(levels, event.value, getattr(event.start_mark, "line", 0) + 1)
            else:
                _count(levels, 1)


def _count(levels: list[_Level], size: int) -> None:
    """Add a finished value to what it is in; it may have been a key, which then has no name."""
    if levels:
        level = levels[-1]
        level.size += size
        if level.is_mapping:
            level.key = "?" if level.key is None else None


def _note_key(levels: list[_Level], key: str, line: int) -> None:
    level = levels[-1]
    if key in level.lines and key != "<<":
        path = ".".join([*(each.key for each in levels[:-1] if each.key), key])
        raise RefusedYamlError(
            f"key {path} stands twice (lines {level.lines[key]} and {line}); keep one"
        )
    level.lines[key] = line
    level.key = key
    level.size += 1
