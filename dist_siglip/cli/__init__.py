"""The command line: ``dist-siglip VERB ...``; the only place that parses.

Each verb is a module that is imported when it is asked for, so that ``--help`` answers at once.
A ``UserError`` becomes one line on stderr and exit code 2; anything else keeps its traceback.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from dist_siglip.errors import UserError

# Verb -> module with ``run(verb, arguments) -> exit code``, one line of help.
_VERBS = {
    "quickstart": (
        "dist_siglip.cli.quickstart",
        "write handwriting shards, train on 2 processes, evaluate, report",
    ),
    "fit": ("dist_siglip.cli.training", "train, or go on with a run"),
    "validate": ("dist_siglip.cli.training", "evaluate a checkpoint"),
    "data": ("dist_siglip.cli.data", "index, check, plan and write webdataset shards"),
    "embed": ("dist_siglip.cli.embed", "write the embeddings of shards, on any number of ranks"),
    "bench": ("dist_siglip.cli.bench", "measure, predict or simulate what the loss costs"),
    "export": ("dist_siglip.cli.export", "a trained model as other libraries read it"),
    "calibrate": (
        "dist_siglip.cli.calibrate",
        "fit scale and bias to a model, its data and its global batch",
    ),
}

EXIT_OK, EXIT_BELOW_FLOOR, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    Args:
        arguments: what follows the program's name; ``sys.argv[1:]`` by default.

    Returns:
        0 done; 1 ``quickstart`` stayed below its recall floor; 2 a mistake of the user, told in
        one line; 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return EXIT_OK if arguments else EXIT_USER_ERROR
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        from dist_siglip import __version__

        sys.stdout.write(f"dist-siglip {__version__}\n")
        return EXIT_OK
    try:
        code: int = importlib.import_module(_module_of(verb)).run(verb, rest)
    except UserError as error:
        _complain(f"dist-siglip: error: {error}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _complain("dist-siglip: interrupted")
        return EXIT_INTERRUPTED
    return code


def _module_of(verb: str) -> str:
    if verb not in _VERBS:
        near = get_close_matches(verb, _VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(_VERBS)}"
        raise UserError(f"there is no verb {verb!r}; {hint}")
    return _VERBS[verb][0]


def _complain(message: str) -> None:
    """Write one line; a rank other than 0 says which one it is."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK")
    prefix = f"[rank {rank}] " if rank and rank != "0" else ""
    sys.stderr.write(prefix + " ".join(message.split()) + "\n")


def _help() -> str:
    width = max(map(len, _VERBS)) + 2
    lines = ["usage: dist-siglip VERB [options]", ""]
    lines += [f"  {verb:<{width}}{text}" for verb, (_, text) in _VERBS.items()]
    lines += ["", "dist-siglip VERB --help lists the options of a verb.", ""]
    return "\n".join(lines)
