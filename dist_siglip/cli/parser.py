"""Parsers whose complaints are one line."""

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from dist_siglip.cli.ranges import check_ranges
from dist_siglip.errors import UserError

_UNKNOWN_KEY = re.compile(r"(?:Key|Group key) '?\"?([\w.]+)\"?'? (?:is not expected|not found)")
_UNRECOGNIZED = re.compile(r"(?i)unrecognized arguments: --?([\w.]+)")
_NOT_ACCEPTED = re.compile(r"does not accept (?:option|nested key) '([\w.]+)'")


class VerbParser(ArgumentParser):
    """A jsonargparse parser that raises ``UserError`` instead of printing its usage."""

    def parse_args(  # type: ignore[override]  # jsonargparse differs from argparse likewise
        self, args: Any = None, *more: Any, **options: Any
    ) -> Namespace:
        """Parse, and refuse numbers that are out of range."""
        settings = parse_shallow(super().parse_args, args, *more, **options)
        check_ranges(settings)
        return settings

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the complaint as one line with a remedy."""
        raise UserError(one_line(message, self)) from ex


class TrainingParser(LightningArgumentParser):
    """The same for Lightning's parser."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the complaint as one line with a remedy."""
        raise UserError(one_line(message, self)) from ex


def parse_shallow(parse: Callable[..., Namespace], *given: Any, **options: Any) -> Namespace:
    """Parse; refuse nests and numbers that no reader of YAML or JSON gets to the end of."""
    try:
        return parse(*given, **options)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError("the configuration is nested too deeply; no setting is so deep") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(
            f"the configuration cannot be read: {' '.join(str(error).split())}"
        ) from error


def one_line(message: str, parser: ArgumentParser) -> str:
    """Fold a complaint of jsonargparse into one line; name the nearest key for an unknown one."""
    folded = " ".join(message.split())
    patterns = (_UNKNOWN_KEY, _UNRECOGNIZED, _NOT_ACCEPTED)
    unknown = next((found for found in (p.search(folded) for p in patterns) if found), None)
    if unknown is None:
        return folded if len(folded) <= 600 else f"{folded[:600]} ..."
    key = re.sub(r"^(fit|validate|test|calibrate)\.", "", unknown.group(1))
    near = get_close_matches(key, known_keys(parser), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see --help for the keys there are"
    return f"configuration key ({key}) is unknown; {hint}"


def known_keys(parser: ArgumentParser) -> list[str]:
    """Dotted names of everything a parser accepts, those of its subcommands included."""
    keys: list[str] = []
    for action in parser._actions:
        choices = getattr(action, "choices", None)
        if isinstance(choices, dict) and all(hasattr(c, "_actions") for c in choices.values()):
            for subparser in choices.values():
                keys += known_keys(subparser)
        elif action.dest not in ("help", "config", "==SUPPRESS=="):
            keys.append(action.dest)
    return keys
