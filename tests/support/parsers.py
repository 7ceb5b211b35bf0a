"""The parser of every command line, carried out of the command before it parses."""

import importlib
from functools import cache

import pytest
from jsonargparse import ArgumentParser

from dist_siglip.cli import _COMMANDS
from dist_siglip.cli.help import subcommands_of
from dist_siglip.cli.parser import CommandParser
from dist_siglip.cli.run.training import TrainingCLI


class _Parser(BaseException):  # nothing on the way catches it
    """Carries the parser of a command line out of the command."""


def command_lines() -> list[tuple[str, ...]]:
    """The words of every command: its name, or name and subcommand."""
    return [
        words
        for command, (module, _) in _COMMANDS.items()
        for words in [(command, each) for each in subcommands_of(module)] or [(command,)]
    ]


@cache
def parser_of_command(words: tuple[str, ...]) -> ArgumentParser:
    """The parser that a command gives its arguments to."""

    def carry(parser, *_, **__):
        raise _Parser(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CommandParser, "parse_args", carry)
        patch.setattr(TrainingCLI, "parse_arguments", lambda _, parser, __: carry(parser))
        run = importlib.import_module(_COMMANDS[words[0]][0]).run
        with pytest.raises(_Parser) as caught:
            run(words[0], words[1:])
    parser = caught.value.args[0]
    for action in parser._actions:
        if isinstance(action.choices, dict):  # the commands of a run
            return action.choices[words[-1]]
    return parser
