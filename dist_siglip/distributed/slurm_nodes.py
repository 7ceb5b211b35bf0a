"""Nodes and GPUs of a job, read from SLURM's variables."""

import re
from collections.abc import Mapping

from dist_siglip.errors import UserError

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_FIRST = re.compile(r"\d+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def first_node(node_list: str) -> str:
    """Return the first name of a node list, as ``scontrol show hostnames`` would.

    Args:
        node_list: names and ranges, as in ``SLURM_NODELIST``; of several ranges in a name the first
            numbers make the first node.

    Raises:
        UserError: if it cannot be read.

    Example:
        >>> first_node("rack1-[01-02]n[1-4]"), first_node("gpu-a3,gpu-b[1-2]")
        ('rack1-01n1', 'gpu-a3')
        >>> first_node("n[7,9-12]-ib")
        'n7-ib'
    """
    # A comma inside of brackets parts numbers, outside of them nodes.
    whole = re.split(r"[,\s](?![^\[]*\])", node_list.strip(), maxsplit=1)[0]

    def first_number(found: re.Match[str]) -> str:
        number = _FIRST.match(found.group(1))
        return number.group() if number else found.group()

    name = _BRACKETS.sub(first_number, whole)
    if not _NAME.fullmatch(name):
        raise UserError(
            f"the node list of SLURM ({node_list}) cannot be read; set MASTER_ADDR to the name of "
            "its first node: export MASTER_ADDR=$(scontrol show hostnames | head -n1)"
        )
    return name


def main_address(environ: Mapping[str, str]) -> str:
    """Return the host of rank 0: ``MASTER_ADDR``, else the first node of the step or the job.

    Raises:
        UserError: as ``first_node``.

    Example:
        >>> main_address({"MASTER_ADDR": "a", "SLURM_NODELIST": "b"})
        'a'
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or "127.0.0.1"
    return environ.get("MASTER_ADDR") or first_node(nodes)


def complain_about_gpus(environ: Mapping[str, str]) -> str:
    """Say so if every task sees a GPU of its own only; empty if not, or if it cannot be told.

    Example:
        >>> job = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}
        >>> complain_about_gpus({**job, "CUDA_VISIBLE_DEVICES": "0,1"})
        ''
        >>> complain_about_gpus({**job, "CUDA_VISIBLE_DEVICES": "1"}).split(";")[0]
        'each of the 2 tasks of this node sees 1 GPU (CUDA_VISIBLE_DEVICES=1) and not all 2'
    """
    visible = [each for each in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    said = environ.get("SLURM_NTASKS_PER_NODE") or environ.get("SLURM_STEP_TASKS_PER_NODE") or ""
    found = _FIRST.match(said)
    tasks = int(found.group()) if found and "SLURM_LOCALID" in environ else 1
    if not 0 < len(visible) < tasks:
        return ""
    plural = "s" if len(visible) > 1 else ""
    return (
        f"each of the {tasks} tasks of this node sees {len(visible)} GPU{plural} "
        f"(CUDA_VISIBLE_DEVICES={','.join(visible)}) and not all {tasks}; ask for "
        f"--gpus-per-node={tasks} without --gpus-per-task and --gpu-bind, or start srun with "
        "--gpu-bind=none"
    )
