"""A command that warns like a package and like a user's file, in every kind of process."""

import multiprocessing
import sys
import sysconfig
import warnings
from pathlib import Path

from dist_siglip import cli

PACKAGE = str(Path(sysconfig.get_path("purelib")) / "torch" / "distributed.py")
OURS = str(Path(cli.__file__).parents[1] / "distributed" / "combine.py")


def warn(process: str) -> None:
    """Warn from a line of a package, from one of ours that calls it, and from a user's file."""
    for path in (PACKAGE, OURS):
        warnings.warn_explicit(f"old name in {process}", FutureWarning, path, 1)
    warnings.warn_explicit(
        f"CUDA initialization: driver too old\nin {process}", UserWarning, PACKAGE, 2
    )
    warnings.warn_explicit(f"odd picture in {process}", UserWarning, "/home/me/stages.py", 3)


def run(command: str, arguments: list[str]) -> int:
    """Warn here, in a forked process and in a spawned one."""
    warn("main")
    for kind, name in (("fork", "forked"), ("spawn", "spawned")):
        process = multiprocessing.get_context(kind).Process(target=warn, args=(name,))
        process.start()
        process.join()
    return 0


if __name__ == "__main__":
    cli._COMMANDS["warn"] = ("tests.support.warning_command", "")
    sys.exit(cli.main(["warn"]))
