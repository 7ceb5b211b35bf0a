"""Examination of all ranks together, in which every wait has a limit.

Ranks meet in a store, look around each for itself, measure what is between them, and the first one
shows the page. Between these stages it hears all others within the limit; a stage that not all have
reached is left out, and those that are missing are named.

Rank, number of ranks and address of the store are read as ``fit`` reads them: from torchrun's
variables, else from srun's as Lightning reads them. A job that ``fit`` would misread is reported.
"""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch

from dist_siglip.cli.run.trainer_parts import SlurmTasks
from dist_siglip.distributed import World
from dist_siglip.distributed.slurm_nodes import complain_about_gpus, main_address
from dist_siglip.distributed.store_channel import StoreChannel, rendezvous
from dist_siglip.doctor.machine import Look, Plan, look_around, unpack_look
from dist_siglip.doctor.page import BoundedChecks, Finding, merge
from dist_siglip.doctor.ranks import (
    GroupFacts,
    compare_ranks,
    judge_group,
    look_at_layout,
    measure_group,
    unpack_group,
)
from dist_siglip.doctor.storage import locked_file
from dist_siglip.errors import UserError
from dist_siglip.health.start_check import list_ranks


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


_SHARE = 0.8  # of the time limit of a stage for what a rank does by itself in it
_GRACE_SECONDS = 5.0  # others wait so much longer for the first rank than it does for them


class Features(NamedTuple):
    """What each rank sends through every exchange."""

    num_rows: int
    embed_dim: int


class Outcome(NamedTuple):
    """What came out.

    Attributes:
        findings: lines of the page.
        num_nodes: of the run; 0 if not known.
        speaks: whether this process shows the page.
        has_failed: whether a line of any rank is "FAIL".
        has_hung: whether a thread of this process never came back.
    """

    findings: list[Finding]
    num_nodes: int
    speaks: bool
    has_failed: bool
    has_hung: bool


def examine_alone(launch: Launch, plan: Plan, limit_seconds: float) -> Outcome:
    """Look at this machine."""
    checks = BoundedChecks(limit_seconds)
    look = look_around(launch.world, plan, None, checks)
    findings = merge([look.findings])
    if launch.complaint is None:
        count = torch.cuda.device_count()
        how = (
            f"torchrun --nproc_per_node={max(2, count)} -m dist_siglip doctor, or srun, tries them"
        )
        findings.append(Finding("-", "exchanges", f"one process has none: {how}"))
    return Outcome(findings, 1, True, _has_failed(findings), checks.has_hung)


def examine_together(
    launch: Launch, plan: Plan, features: Features, limit_seconds: float
) -> Outcome:
    """Look at all ranks and what is between them; every rank calls it."""
    world = launch.world
    place = f"{launch.address}:{launch.port}"
    try:
        channel = rendezvous(
            world.rank,
            world.world_size,
            address=launch.address,
            port=launch.port,
            limit_seconds=limit_seconds,
            is_served=launch.is_served,
            name=f"doctor-{restart_count()}",
        )
        if world.is_first:
            return _examine_as_first(launch, plan, features, channel, limit_seconds)
        return _examine_as_other(launch, plan, features, channel, limit_seconds)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        text = f"rank 0 cannot be met at {place}, or went away: {reason}"
        remedy = "look at its log; do MASTER_ADDR and MASTER_PORT name its node, and a free port?"
        return Outcome([Finding("FAIL", "ranks", text, remedy)], 0, True, True, False)


def _examine_as_first(
    launch: Launch, plan: Plan, features: Features, channel: StoreChannel, limit_seconds: float
) -> Outcome:
    channel.publish("here", launch.host)
    hosts = channel.gather("here", limit_seconds)
    present = [rank for rank, host in enumerate(hosts) if host is not None]
    with ExitStack() as stack:
        opening_checks = BoundedChecks(_SHARE * limit_seconds)
        kept_file = opening_checks.run("run folder", lambda: _keep_file(stack, plan.run_dir))
        channel.broadcast("opening", {"kept_file": kept_file})
        stage_ends = time.monotonic() + limit_seconds
        checks = BoundedChecks(_SHARE * limit_seconds)
        channel.publish("look", look_around(launch.world, plan, kept_file, checks)._asdict())
        told = channel.gather("look", stage_ends - time.monotonic(), present)
        looks = [None if value is None else unpack_look(value) for value in told]
        findings = _missing(hosts, told, limit_seconds, f"{launch.address}:{launch.port}")
        per_node = 1
        if not findings:
            findings, per_node = look_at_layout(hosts)
        findings += merge([look and look.findings for look in looks])
        findings += compare_ranks([look and look.facts for look in looks])
        findings += _shards_differ(looks) + _share_gpus(looks, hosts)
        decision = {
            "goes_on": all(told),
            "backend": "nccl" if _can_use_nccl(looks, hosts) else "gloo",
            "local_world_size": per_node,
        }
        channel.broadcast("decision", decision)
        has_hung = opening_checks.has_hung or checks.has_hung
        if decision["goes_on"]:
            stage_ends = time.monotonic() + limit_seconds
            has_hung |= _measure(launch, features, channel, decision, limit_seconds)
            ends = channel.gather("end", stage_ends - time.monotonic())
            findings += _judge_ends(ends, hosts, features)
            told = ends
        channel.broadcast("verdict", _has_failed(findings))
        channel.leave(sum(value is not None for value in told))
    num_nodes = len(set(hosts)) if all(hosts) else 0
    return Outcome(findings, num_nodes, True, _has_failed(findings), has_hung)


def _examine_as_other(
    launch: Launch, plan: Plan, features: Features, channel: StoreChannel, limit_seconds: float
) -> Outcome:
    patience = limit_seconds + _GRACE_SECONDS
    channel.publish("here", launch.host)
    opening = _receive(channel, "opening", patience + _SHARE * limit_seconds)
    stage_ends = time.monotonic() + patience
    checks = BoundedChecks(_SHARE * limit_seconds)
    look = look_around(launch.world, plan, opening["kept_file"], checks)
    channel.publish("look", look._asdict())
    decision = _receive(channel, "decision", stage_ends - time.monotonic())
    stage_ends = time.monotonic() + patience
    has_hung = checks.has_hung
    if decision["goes_on"]:
        has_hung |= _measure(launch, features, channel, decision, limit_seconds)
    has_failed = _receive(channel, "verdict", stage_ends - time.monotonic())
    channel.leave(0)
    return Outcome([], 0, False, has_failed, has_hung)


def _receive(channel: StoreChannel, occasion: str, limit_seconds: float) -> Any:
    answer = channel.receive(occasion, limit_seconds)
    if answer is None:
        raise RuntimeError(f"it said nothing for {limit_seconds:.0f} s")
    return answer


def _measure(
    launch: Launch,
    features: Features,
    channel: StoreChannel,
    decision: dict[str, Any],
    limit_seconds: float,
) -> bool:
    """Measure what is between the ranks and tell it; return whether that has hung."""
    checks = BoundedChecks(_SHARE * limit_seconds)
    facts = checks.run(
        "group",
        lambda: measure_group(
            channel,
            launch.world,
            backend=decision["backend"],
            local_world_size=decision["local_world_size"],
            num_rows=features.num_rows,
            embed_dim=features.embed_dim,
            # Whoever waits inside a group learns more than that its time is over.
            limit=timedelta(seconds=limit_seconds / 3),
        ),
        remedy="look at the log of the rank that is named; check firewall and interfaces",
    )
    channel.publish("end", {"facts": facts, "findings": checks.findings})
    return checks.has_hung


def _keep_file(stack: ExitStack, run_dir: Path | None) -> str | None:
    """Keep a locked file in the run folder, for the others to find."""
    if run_dir is None:
        return None
    return str(stack.enter_context(locked_file(run_dir, f".dist_siglip-doctor-{uuid4().hex}")))


def _missing(
    hosts: list[str | None], looks: list[Any], limit_seconds: float, place: str
) -> list[Finding]:
    """Name ranks that never came, and ranks that came and then did not come back."""
    findings = []
    absent = [rank for rank, host in enumerate(hosts) if host is None]
    lost = [rank for rank, look in enumerate(looks) if look is None and rank not in absent]
    if absent:
        here = [rank for rank in range(len(hosts)) if rank not in absent]
        names = list(dict.fromkeys(str(hosts[rank]) for rank in here))
        text = (
            f"rank {list_ranks(absent)} of {len(hosts)} did not come within {limit_seconds:g} s; "
            f"rank {list_ranks(here)} did, of {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
        )
        remedy = f"look at their logs: did they start, and can they reach {place}?"
        findings.append(Finding("FAIL", "ranks", text, remedy))
    if lost:
        text = (
            f"rank {list_ranks(lost)} ({', '.join(str(hosts[rank]) for rank in lost)}) came, and "
            f"was not done within {limit_seconds:g} s"
        )
        remedy = "look at its log: it ended, or its node hangs"
        findings.append(Finding("FAIL", "ranks", text, remedy))
    return findings


def _shards_differ(looks: list[Look | None]) -> list[Finding]:
    """Compare shards over nodes; say nothing more if they are alike."""
    found = compare_ranks([look and look.shard_facts for look in looks])
    return [finding for finding in found if finding.status == "FAIL"]


def _share_gpus(looks: list[Look | None], hosts: list[str | None]) -> list[Finding]:
    ranks_of: dict[tuple[str | None, str], list[int]] = {}
    for rank, (look, host) in enumerate(zip(looks, hosts, strict=True)):
        if look is not None and look.gpu:
            ranks_of.setdefault((host, look.gpu), []).append(rank)
    return [
        Finding(
            "FAIL",
            "devices",
            f"rank {list_ranks(ranks)} share one GPU of {host}",
            "start as many tasks on a node as it has GPUs: --ntasks-per-node and --gpus-per-node",
        )
        for (host, _), ranks in ranks_of.items()
        if len(ranks) > 1
    ]


def _can_use_nccl(looks: list[Look | None], hosts: list[str | None]) -> bool:
    """Whether every rank has a GPU of its own."""
    return all(look and look.gpu for look in looks) and not _share_gpus(looks, hosts)


def _judge_ends(ends: list[Any], hosts: list[str], features: Features) -> list[Finding]:
    gone = [rank for rank, end in enumerate(ends) if end is None]
    if gone:
        text = f"rank {list_ranks(gone)} ended or hangs while the exchanges are measured"
        return [Finding("FAIL", "group", text, "look at its log")]
    complaints = [[Finding(*finding) for finding in end["findings"]] for end in ends]
    if any(complaints):
        return merge(complaints)
    facts: list[GroupFacts] = [unpack_group(end["facts"]) for end in ends]
    return list(judge_group(facts, hosts, features.num_rows * features.embed_dim * 4))


def _has_failed(findings: list[Finding]) -> bool:
    return any(finding.status == "FAIL" for finding in findings)
