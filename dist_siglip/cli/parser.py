"""Parsers whose complaints are one line, and that read YAML within bounds."""

import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from dist_siglip.cli.ranges import check_ranges
from dist_siglip.cli.working_directory import modules_of_working_directory
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import check_regular
from dist_siglip.system.yaml_text import RefusedYamlError, check_yaml, naming_values

_UNKNOWN_KEY = re.compile(r"(?:Key|Group key) '?\"?([\w.]+)\"?'? (?:is not expected|not found)")
_UNRECOGNIZED = re.compile(r"(?i)unrecognized arguments: --?([\w.]+)")
_NOT_ACCEPTED = re.compile(r"does not accept (?:option|nested key) '([\w.]+)'")


# A shell hands over what a command prints, as in --config <(...), under such a name.
_SHELL_PIPES = ("/dev/fd/", "/proc/self/fd/")
_load_as_ever = get_loader("yaml")


class _RefusedTextError(Exception):
    """A text that YAML gives a meaning it must not have; no complaint that jsonargparse catches."""


def _load(text: str) -> Any:
    """Load what jsonargparse takes for YAML: configurations, and values of options."""
    try:
        with naming_values():
            check_yaml(text)
            return _load_as_ever(text)
    except RefusedYamlError as error:
        raise _RefusedTextError(str(error)) from error


set_loader("yaml", _load, (yaml.YAMLError,))


class _OneLineParser(ArgumentParser):
    """Raises ``UserError`` instead of printing the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the complaint as one line with a remedy."""
        raise UserError(one_line(message, self)) from ex

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the command line."""
        try:
            return parse_shallow(super().parse_args, *args, **kwargs)
        except _RefusedTextError as error:
            raise UserError(f"value of an option: {error}") from error

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """Parse a configuration, from a file that can be read to its end."""
        try:
            if not str(path).startswith(_SHELL_PIPES):
                check_regular(path)
            return super().parse_path(path, *args, **kwargs)
        except _RefusedTextError as error:
            raise UserError(f"config ({path}): {error}") from error
        except OSError as error:
            raise UserError(f"config ({path}) cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"config ({path}) is no text in UTF-8: {error.reason}") from error


class VerbParser(_OneLineParser):
    """Parser of a verb that is a function."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse, and refuse numbers that are out of range."""
        settings = super().parse_args(*args, **kwargs)
        check_ranges(settings)
        return settings


class TrainingParser(_OneLineParser, LightningArgumentParser):
    """Parser of Lightning's command line."""


def parse_shallow(
    parse: Callable[..., Namespace], arguments: Any, *more: Any, **options: Any
) -> Namespace:
    """Parse, with class paths of the working directory.

    Raises:
        UserError: for nests and numbers that no reader of YAML or JSON gets to the end of.
    """
    try:
        with modules_of_working_directory([str(word) for word in arguments or ()]):
            return parse(arguments, *more, **options)
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
