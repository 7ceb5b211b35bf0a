"""``bench``: what the loss costs, measured here, predicted for a cluster, or simulated."""

import importlib
import sys
from collections.abc import Callable, Sequence

from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.parser import VerbParser
from dist_siglip.errors import UserError

# Name -> module that holds a function of this name: its signature is the schema.
_SUBJECTS = {
    "loss": ("dist_siglip.cli.bench_loss", "time and memory beside other losses, on this machine"),
    "plan": ("dist_siglip.cli.bench_plan", "predicted cost of every exchange on a cluster"),
    "simulate": (
        "dist_siglip.cli.bench_simulate",
        "one rank of a large world, run on this machine",
    ),
}


def run(verb: str, arguments: Sequence[str]) -> int:
    """Parse ``bench SUBJECT ...`` and run the subject."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"usage: dist-siglip {verb} SUBJECT [options]", ""]
        lines += [f"  {name:<10}{text}" for name, (_, text) in _SUBJECTS.items()]
        sys.stdout.write("\n".join([*lines, ""]))
        return 0 if arguments else 2
    set_up_logging()
    function, parser = parser_of(verb, arguments[0])
    return function(**parser.parse_args(list(arguments[1:])).as_dict())


def parser_of(verb: str, subject: str) -> tuple[Callable[..., int], VerbParser]:
    """Return the function of a subject and the parser of its signature.

    Raises:
        UserError: if there is no such subject.
    """
    if subject not in _SUBJECTS:
        raise UserError(f"bench ({subject}) must be one of {', '.join(_SUBJECTS)}")
    function: Callable[..., int] = getattr(importlib.import_module(_SUBJECTS[subject][0]), subject)
    parser = VerbParser(prog=f"dist-siglip {verb} {subject}", description=function.__doc__)
    parser.add_function_arguments(function, as_group=False)
    return function, parser
