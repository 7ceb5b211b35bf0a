"""Verbs with subjects: ``dist-siglip VERB SUBJECT [options]``.

A subject is a function in a module of its own, imported when it is asked for; the function's
signature is the schema of its command line and its docstring the help.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence

from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.parser import VerbParser
from dist_siglip.errors import UserError

# Subject -> module that holds a function of this name, one line of help.
Subjects = Mapping[str, tuple[str, str]]


def run_subject(verb: str, subjects: Subjects, arguments: Sequence[str]) -> int:
    """Parse ``VERB SUBJECT ...``, run the subject and return its exit code.

    Raises:
        UserError: if there is no such subject, or its arguments cannot be parsed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"usage: dist-siglip {verb} SUBJECT [options]", ""]
        lines += [f"  {name:<12}{text}" for name, (_, text) in subjects.items()]
        sys.stdout.write("\n".join([*lines, ""]))
        return 0 if arguments else 2
    set_up_logging()
    function, parser = parser_of(verb, subjects, arguments[0])
    settings = parser.instantiate_classes(parser.parse_args(list(arguments[1:])))
    return function(**settings.as_dict())


def parser_of(verb: str, subjects: Subjects, subject: str) -> tuple[Callable[..., int], VerbParser]:
    """Return the function of a subject and the parser of its signature.

    Required arguments are positional.

    Raises:
        UserError: if there is no such subject.
    """
    if subject not in subjects:
        raise UserError(f"{verb} ({subject}) must be one of {', '.join(subjects)}")
    function: Callable[..., int] = getattr(importlib.import_module(subjects[subject][0]), subject)
    parser = VerbParser(prog=f"dist-siglip {verb} {subject}", description=function.__doc__)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return function, parser
