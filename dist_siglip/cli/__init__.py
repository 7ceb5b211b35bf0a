"""The command line: ``dist-siglip COMMAND ...``; the only place that parses.

The module of a command is imported when it runs. Help pages are read from the source, so that
``--help`` answers at once; ``--help-all`` asks the parser of the command. A ``UserError`` becomes
one line on stderr and exit code 2; anything else keeps its traceback.
"""

import importlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from difflib import get_close_matches

from dist_siglip.cli.help import asked_page, check_subcommand, for_parser
from dist_siglip.cli.logs import packages_kept_quiet
from dist_siglip.errors import LoaderError, OutageError, RunFailedError, RunMovedError, UserError
from dist_siglip.system import signals
from dist_siglip.system.redaction import redact

# Command -> module with ``run(command, arguments) -> exit code``, one line of help.
_COMMANDS = {
    "quickstart": (
        "dist_siglip.cli.run.quickstart",
        "write handwriting shards, train on 2 processes, evaluate, report",
    ),
    "fit": ("dist_siglip.cli.run.training", "train, or go on with a run"),
    "validate": ("dist_siglip.cli.run.training", "evaluate a checkpoint"),
    "test": ("dist_siglip.cli.run.testing", "a checkpoint or a model by name on benchmarks"),
    "rerank": (
        "dist_siglip.cli.run.rerank",
        "fit or validate: train a head that re-ranks what a dual encoder finds",
    ),
    "data": ("dist_siglip.cli.data", "index, check, plan and write webdataset shards"),
    "embed": ("dist_siglip.cli.embed", "write the embeddings of shards, on any number of ranks"),
    "search": (
        "dist_siglip.cli.run.search",
        "the best pictures for a text or a picture, or a page",
    ),
    "align": ("dist_siglip.cli.align", "how well two sets of embeddings agree"),
    "bench": ("dist_siglip.bench", "measure, predict or simulate what the loss costs"),
    "report": ("dist_siglip.cli.run.report", "one page about a run, or several side by side"),
    "capacity": (
        "dist_siglip.cli.capacity",
        "do so many pairs fit into so many dimensions at a margin",
    ),
    "slurm": ("dist_siglip.cli.slurm", "print or submit the batch script of a run"),
    "doctor": ("dist_siglip.doctor", "will a run work here: machines, ranks, folder, shards"),
    "export": ("dist_siglip.cli.run.export", "a trained model as other libraries read it"),
    "average": (
        "dist_siglip.cli.run.average",
        "average weights: of a run and its start, or soups of several runs",
    ),
    "lab": ("dist_siglip.cli.lab", "run published experiments and compare with what was published"),
    "calibrate": (
        "dist_siglip.cli.run.calibrate",
        "fit scale and bias to a model, its data and its global batch",
    ),
}

# Commands that train, and save when they are asked to stop.
_TRAINING = ("fit", "rerank", "quickstart")

EXIT_OK, EXIT_BELOW_FLOOR, EXIT_USER_ERROR, EXIT_FAILED, EXIT_COLLAPSED = 0, 1, 2, 3, 4
EXIT_LOADER = LoaderError.exit_code
EXIT_MOVED, EXIT_SAVED, EXIT_INTERRUPTED = 73, 75, signals.EXIT_INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    Args:
        arguments: what follows the program's name; ``sys.argv[1:]`` by default.

    Returns:
        0 done; 1 ``quickstart`` stayed below its recall floor, or a check found damage; 2 a
        mistake of the user, told in one line; 3 a run that would fail again, told in one line; 4
        ``collapse_alarm`` stopped the run, with checkpoint and report; 71 a loader process died or
        failed; 73 the run folder was moved away under a run; 75 ``fit`` was asked to stop and has
        saved, or a server does not answer: goes on when started again; 130 interrupted (``fit``
        has saved, at the first Ctrl-C). A process whose ranks hang ends with 70, without returning.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return EXIT_OK if arguments else EXIT_USER_ERROR
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        from dist_siglip import __version__

        sys.stdout.write(f"dist-siglip {__version__}\n")
        return EXIT_OK
    if command in _COMMANDS:
        page = asked_page(command, *_COMMANDS[command], rest)
        if page is not None:
            sys.stdout.write(page)
            return EXIT_OK if rest else EXIT_USER_ERROR
    listening = signals.listening() if command in _TRAINING else nullcontext()
    # Before the heavy imports: they warn, and a signal during them must not end the run.
    with packages_kept_quiet(), listening:
        code = _run(command, for_parser(rest))
        if code == EXIT_SAVED or (code != EXIT_OK and signals.rank_of_launcher()):
            # A launcher that sees one rank leave ends the others; each keeps its own exit code.
            signals.ignore()
    return code


def _run(command: str, arguments: Sequence[str]) -> int:
    """Run a command, and tell in one line what a person can mend."""
    try:
        module = _module_of(command)
        check_subcommand(command, module, arguments)
        code: int = importlib.import_module(module).run(command, arguments)
    except UserError as error:
        _complain(f"dist-siglip: error: {_words_of(error)}")
        return EXIT_USER_ERROR
    except RunFailedError as error:
        _complain(f"dist-siglip: failed: {_words_of(error)}")
        return EXIT_LOADER if isinstance(error, LoaderError) else EXIT_FAILED
    except RunMovedError as error:
        if signals.is_first():  # it holds the folder, and knows where that is
            _complain(f"dist-siglip: moved: {error}")
        return EXIT_MOVED
    except OutageError as error:
        _complain(f"dist-siglip: out of reach: {_words_of(error)}; start again to go on")
        return EXIT_SAVED
    except KeyboardInterrupt:
        return _tell_interrupt()
    except SystemExit as end:
        # Lightning makes one of an interrupt.
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        return _tell_interrupt()
    except Exception as error:
        if signals.is_interrupted():  # this rank fails because another one has left
            return _tell_interrupt(f"; while ending: {type(error).__name__}: {error}")
        from dist_siglip.data.samples.loader import loader_failure  # heavy

        failure = loader_failure(error)
        if failure is None:
            raise
        _complain(f"dist-siglip: failed: {failure}")
        return EXIT_LOADER
    return code


def _words_of(error: Exception) -> str:
    """Return what an error says, without the traceback that a loader process puts around it."""
    text = str(error)
    if "\nOriginal Traceback" in text:
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return text


def _tell_interrupt(more: str = "") -> int:
    """Say where a run was interrupted, once for all ranks."""
    if signals.is_first():
        _complain(f"dist-siglip: interrupted{signals.where()}{more[:200]}")
    return EXIT_INTERRUPTED


def _module_of(command: str) -> str:
    if command not in _COMMANDS:
        near = get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(_COMMANDS)}"
        raise UserError(f"there is no command {command!r}; {hint}")
    return _COMMANDS[command][0]


def _complain(message: str) -> None:
    """Write one line; a rank other than 0 says which one it is."""
    rank = signals.rank_of_launcher()
    prefix = f"[rank {rank}] " if rank and rank != "0" else ""
    with suppress(OSError):  # a terminal that is gone
        sys.stderr.write(prefix + redact(" ".join(message.split())) + "\n")


def _help() -> str:
    width = max(map(len, _COMMANDS)) + 2
    lines = ["usage: dist-siglip COMMAND [options]", ""]
    lines += [f"  {command:<{width}}{text}" for command, (_, text) in _COMMANDS.items()]
    lines += ["", "COMMAND --help lists the options of a command; --version tells the version.", ""]
    return "\n".join(lines)
