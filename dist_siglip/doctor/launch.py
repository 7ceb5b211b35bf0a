"""The launcher of this process: its rank, the number of ranks, and the address of their store.

It is read as ``fit`` reads it: from torchrun's variables, else from srun's as Lightning reads them.
A job that ``fit`` would misread is reported.
"""

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from dist_siglip.cli.run.trainer_parts import SlurmTasks
from dist_siglip.distributed import World
from dist_siglip.distributed.slurm_nodes import complain_about_gpus, main_address
from dist_siglip.doctor.page import Finding
from dist_siglip.errors import UserError


class Launch(NamedTuple):
    """How this process was started.

    Attributes:
        world: this rank; a world of one where only this machine can be looked at.
        host: name of the node.
        address: host of rank 0; "" in a world of one.
        port: on that host.
        is_served: whether the launcher keeps a store there.
        complaint: what is wrong with the way it was started, if anything.
        is_silent: whether another process of a world of one speaks for all.
    """

    world: World
    host: str
    address: str = ""
    port: int = 0
    is_served: bool = False
    complaint: Finding | None = None
    is_silent: bool = False


def detect_launch(environ: Mapping[str, str]) -> Launch:
    """Read the launcher's variables.

    Args:
        environ: of this process.
    """
    # Nodes of a test cluster may share a host, and containers a name.
    host = environ.get("SLURMD_NODENAME") or socket.gethostname()
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Launch(
            World.detect(environ),
            host,
            address=environ.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environ.get("MASTER_PORT", "29500")),
            is_served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    if int(environ.get("SLURM_NTASKS") or 1) == 1:
        return Launch(World(), host)
    complaint = _complaint_about_srun(environ)
    if complaint is not None:
        is_silent = int(environ.get("SLURM_PROCID") or 0) > 0
        return Launch(World(), host, complaint=complaint, is_silent=is_silent)
    address, port = main_address(environ), SlurmTasks().main_port
    return Launch(World.detect(environ), host, address=address, port=port)


def _complaint_about_srun(environ: Mapping[str, str]) -> Finding | None:
    """Say what keeps ``fit`` from seeing the ranks of a SLURM job."""
    tasks = environ["SLURM_NTASKS"]
    if not {"SLURM_STEP_ID", "SLURM_STEPID"} & environ.keys():
        text = f"started without srun in a job of {tasks} tasks: only this machine is looked at"
        return Finding("warn", "ranks", text, "srun dist-siglip doctor ...")
    if environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        text = f"the job is named {environ['SLURM_JOB_NAME']}: Lightning takes each task for a run"
        return Finding("FAIL", "ranks", text, "srun --job-name=train ...")
    if "SLURM_NTASKS_PER_NODE" not in environ:
        text = f"{tasks} tasks without --ntasks-per-node: Lightning refuses them"
        return Finding("FAIL", "ranks", text, "ask for --nodes and --ntasks-per-node")
    complaint = complain_about_gpus(environ)
    try:
        main_address(environ)
    except UserError as error:
        complaint = str(error)
    text, _, remedy = complaint.partition("; ")
    return Finding("FAIL", "ranks", text, remedy) if complaint else None


def restart_count() -> str:
    """Which start of a job this is, so that one start never reads what another has said."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return "-".join(os.environ.get(name, "0") for name in names)
