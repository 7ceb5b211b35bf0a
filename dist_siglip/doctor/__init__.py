"""``doctor``: one page that says whether a run will work here, before the job.

The first thing that can fail is the import of the libraries below: of torch and torchvision that do
not belong together, of a driver's library that is missing. So nothing of them is imported here.
"""

import sys
from collections.abc import Sequence

_REMEDY = (
    "torch, torchvision and lightning must fit each other: pip install -U dist-siglip with torch "
    "and torchvision from the same index, in an environment of its own"
)


def run(command: str, arguments: Sequence[str]) -> int:
    """Run ``doctor``; a library that cannot be imported is a finding."""
    try:
        from dist_siglip.doctor.command import run as run_checks
    except Exception as error:  # noqa: BLE001 - broken libraries raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        sys.stdout.write(f"FAIL  imports       {reason}\n{'':20}-> {_REMEDY}\n\n1 failed\n")
        return 1
    return run_checks(command, arguments)
