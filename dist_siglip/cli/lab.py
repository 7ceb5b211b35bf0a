"""``lab``: published experiments on this library's own losses and metrics."""

from collections.abc import Sequence

from dist_siglip.cli.subjects import run_subject

SUBJECTS = {
    "list": ("dist_siglip.cli.lab_list", "which experiments there are"),
    "run": ("dist_siglip.cli.lab_run", "some of them"),
    "all": ("dist_siglip.cli.lab_run", "all of them, within 30 minutes on two cores"),
}


def run(verb: str, arguments: Sequence[str]) -> int:
    """Parse ``lab SUBJECT ...`` and run the subject."""
    return run_subject(verb, SUBJECTS, arguments)
