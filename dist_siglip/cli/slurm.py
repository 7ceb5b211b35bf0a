"""``slurm``: a batch script for a run, printed, or printed and submitted."""

import subprocess
import sys
from collections.abc import Sequence

from dist_siglip.cli.parser import VerbParser
from dist_siglip.cli.slurm_job import SlurmJob
from dist_siglip.cli.subjects import introduction_of
from dist_siglip.errors import UserError

SUBJECTS = {
    "render": "print the batch script of a run",
    "submit": "print it, and submit exactly that",
}


def run(verb: str, arguments: Sequence[str]) -> int:
    """Parse ``slurm SUBJECT CONFIG --run_dir RUN ... [-- OPTIONS OF FIT]`` and do it.

    Raises:
        UserError: if there is no such subject, a value is refused, or sbatch refuses the job.
    """
    subject, *rest = arguments
    if subject not in SUBJECTS:
        raise UserError(f"{verb} ({subject}) must be one of {', '.join(SUBJECTS)}")
    job, fit_options = parse(subject, rest)
    script = job.render(fit_options)
    sys.stdout.write(script)
    sys.stdout.flush()
    if subject == "submit":
        sys.stdout.write(f"\n{submit(script)}\n")
    return 0


def parse(subject: str, arguments: Sequence[str]) -> tuple[SlurmJob, list[str]]:
    """Return the job, and the options of ``fit`` that follow ``--``."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    made = VerbParser(prog=f"dist-siglip slurm {subject}", description=introduction_of(SlurmJob))
    made.add_class_arguments(SlurmJob, as_group=False, as_positional=True)
    settings = made.parse_args(words[:end])
    return SlurmJob(**made.instantiate_classes(settings).as_dict()), words[end + 1 :]


def submit(script: str) -> str:
    """Give a script to sbatch; return what it answers.

    Raises:
        UserError: if there is no sbatch here, or it refuses the job.
    """
    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            "sbatch is not on this machine; submit on a login node of the cluster, or give sbatch "
            "there what dist-siglip slurm render prints"
        ) from error
    if done.returncode:
        raise UserError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
