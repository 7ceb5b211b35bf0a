"""How does a job put itself back into SLURM's queue?

SLURM ends the processes of a job as soon as it is requeued, so this comes after everything that
must not be lost. A job that was cancelled would come back to life, so it is asked about first.
"""

import logging
import os
import subprocess
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_SECONDS = 30


def job_to_requeue(environ: Mapping[str, str]) -> str | None:
    """Return the name SLURM knows this job by; None outside of SLURM.

    Example:
        >>> job_to_requeue({"SLURM_JOB_ID": "7"})
        '7'
        >>> array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
        >>> job_to_requeue({"SLURM_JOB_ID": "7", **array})
        '5_2'
    """
    array = environ.get("SLURM_ARRAY_JOB_ID")
    if array and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def requeue_job() -> bool:
    """Ask SLURM to requeue this job, and say whether it will; failing is a warning."""
    job = job_to_requeue(os.environ)
    if job is None:
        logger.warning("stop.requeue (true) outside of SLURM: start the run again by hand")
        return False
    try:
        state = _ask("squeue", "--noheader", "--job", job, "--format=%T")
        if state != "RUNNING":
            logger.info("job %s is %s and is not requeued", job, state.lower() or "gone")
            return False
        _ask("scontrol", "requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        logger.warning("job %s was not requeued (%s); submit it again", job, reason)
        return False
    logger.info("job %s is requeued", job)
    return True


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    return done.stdout.strip()
