"""Functions as commands: the signature is the schema of the command line, the docstring the help.

A command is one function, or has subjects, ``dist-siglip COMMAND SUBJECT [options]``: each is a
function, whose module is imported when it is asked for.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence

from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.parsing.parser import CommandParser
from dist_siglip.errors import UserError

# Subject -> module that holds a function of this name, one line of help.
Subjects = Mapping[str, tuple[str, str]]


def run_subject(command: str, subjects: Subjects, arguments: Sequence[str]) -> int:
    """Parse ``COMMAND SUBJECT ...``, run the subject and return its exit code.

    Raises:
        UserError: if there is no such subject, or its arguments cannot be parsed.
    """
    function, parser = parser_of(command, subjects, arguments[0])
    return call(function, parser, arguments[1:])


def parser_of(
    command: str, subjects: Subjects, subject: str
) -> tuple[Callable[..., int], CommandParser]:
    """Return the function of a subject and the parser of its signature.

    Required arguments are positional.

    Raises:
        UserError: if there is no such subject.
    """
    if subject not in subjects:
        raise UserError(f"{command} ({subject}) must be one of {', '.join(subjects)}")
    function: Callable[..., int] = getattr(importlib.import_module(subjects[subject][0]), subject)
    return function, parser_of_function(f"{command} {subject}", function)


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
