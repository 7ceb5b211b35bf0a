"""Parsers with one-line complaints and bounded YAML, and functions as commands.

A command is one function, or has subcommands, ``dist-siglip COMMAND SUBCOMMAND [options]``: each is
a function whose signature is the schema and whose docstring is the help. Its module is imported
when it is asked for.

Class paths may name files of the working directory, however the program was started. ``python -m``
has it on ``sys.path``, the ``dist-siglip`` command does not. So a module that a command line or its
files name is looked for there too, after everything installed: no file in the directory can stand
in for a package, and none is imported that was not named. Once one is found, the directory stays
at the end of ``sys.path``, for the processes of loaders.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.ranges import check_ranges
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import check_regular
from dist_siglip.system.yaml_text import RefusedYamlError, check_yaml, naming_values

_DOTTED = re.compile(r"\b([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)+")
_SUFFIXES = (".yaml", ".yml", ".json")
_LARGEST_FILE = 2**20
_UNKNOWN_KEY = re.compile(r"(?:Key|Group key) '?\"?([\w.]+)\"?'? (?:is not expected|not found)")
_UNRECOGNIZED = re.compile(r"(?i)unrecognized arguments: --?([\w.]+)")
_NOT_ACCEPTED = re.compile(r"does not accept (?:option|nested key) '([\w.]+)'")
# A shell hands over what a command prints, as in --config <(...), under such a name.
_SHELL_PIPES = ("/dev/fd/", "/proc/self/fd/")


@contextmanager
def modules_of_working_directory(arguments: Sequence[str]) -> Iterator[None]:
    """Find modules that arguments name in the working directory, while the block runs.

    Args:
        arguments: the command line; YAML and JSON files among them are looked into.
    """
    finder = _Finder(_first_names(arguments), Path.cwd())
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """The last finder that is asked: for modules of a folder with one of these names."""

    def __init__(self, names: set[str], folder: Path) -> None:
        self._names, self._folder = names, str(folder)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where a top-level module lies; packages find their parts themselves."""
        if path is not None or name not in self._names:
            return None
        found = PathFinder.find_spec(name, [self._folder], target)
        if found is None or found.loader is None:  # a mere folder is no module
            return None
        if self._folder not in sys.path:
            sys.path.append(self._folder)
        return found


def _first_names(arguments: Sequence[str]) -> set[str]:
    """First parts of all dotted names in arguments and in the files they name."""
    texts = list(arguments)
    for argument in arguments:
        path = Path(argument.rpartition("=")[2])
        if path.suffix in _SUFFIXES and path.is_file() and path.stat().st_size <= _LARGEST_FILE:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return {found.group(1) for text in texts for found in _DOTTED.finditer(text)}


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


class CommandParser(_OneLineParser):
    """Parser of a command that is a function."""

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
    if any(action.dest == key and not action.option_strings for action in parser._actions):
        return f"{key} is given by its place: leave out --{key}, and see --help for the order"
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


# Subject -> module that holds a function of this name, one line of help.
Subcommands = Mapping[str, tuple[str, str]]


def run_subcommand(command: str, subcommands: Subcommands, arguments: Sequence[str]) -> int:
    """Parse ``COMMAND SUBCOMMAND ...``, run the subcommand and return its exit code.

    Raises:
        UserError: if there is no such subcommand, or its arguments cannot be parsed.
    """
    function, parser = parser_of(command, subcommands, arguments[0])
    return call(function, parser, arguments[1:])


def parser_of(
    command: str, subcommands: Subcommands, subcommand: str
) -> tuple[Callable[..., int], CommandParser]:
    """Return the function of a subcommand and the parser of its signature.

    Required arguments are positional.

    Raises:
        UserError: if there is no such subcommand.
    """
    if subcommand not in subcommands:
        raise UserError(f"{command} ({subcommand}) must be one of {', '.join(subcommands)}")
    function: Callable[..., int] = getattr(
        importlib.import_module(subcommands[subcommand][0]), subcommand
    )
    return function, parser_of_function(f"{command} {subcommand}", function)


def parser_of_function(words: str, function: Callable[..., int]) -> CommandParser:
    """Return the parser of a function's signature.

    Args:
        words: what the command line says after ``dist-siglip``.
        function: returns an exit code.
    """
    parser = CommandParser(prog=f"dist-siglip {words}", description=introduction_of(function))
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return parser


def introduction_of(function: Callable[..., object]) -> str:
    """Return what a docstring says before its sections."""
    return str(function.__doc__).partition("Args:")[0]


def call(function: Callable[..., int], parser: CommandParser, arguments: Sequence[str]) -> int:
    """Parse the arguments of a function, call it and return its exit code."""
    set_up_logging()
    settings = parser.instantiate_classes(parser.parse_args(list(arguments)))
    return function(**settings.as_dict())
