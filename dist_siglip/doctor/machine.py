"""Checks of one rank: versions, devices, memory, limits, environment, and its view of the files."""

import importlib.metadata
import os
import platform
import resource
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement

from dist_siglip.distributed import World
from dist_siglip.doctor.page import BoundedChecks, Finding
from dist_siglip.doctor.storage import ShardSet, look_at_folder, look_at_shards, look_for_file
from dist_siglip.health.start_check import digest_of_sources
from dist_siglip.runs.provenance import installed_versions

_GIB = 2**30
_LEAST_SHARED_MEMORY = _GIB  # loader processes hand batches over through it
_LEAST_OPEN_FILES = 4096
_LARGEST_ERROR = 1e-2  # of a product, relative; TF32 makes 1e-3 of it
_SHOWN_PREFIXES = ("NCCL_", "OMP_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "MASTER_")
_SHOWN_NAMES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_RESTART_COUNT",
)
# Setting -> what it costs; each was meant for finding an error.
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs of a node talk through memory",
    "NCCL_SHM_DISABLE": "GPUs of a node talk through the network",
    "NCCL_IB_DISABLE": "InfiniBand and RoCE are not used",
}


def machine_facts(world: World) -> dict[str, str]:
    """Describe what must be the same on all ranks, readable value by readable name."""
    facts = {name: str(version) for name, version in installed_versions().items()}
    facts["code of dist_siglip"] = digest_of_sources()
    facts["python"] = platform.python_version()
    facts["CUDA of torch"] = str(torch.version.cuda)
    facts["device"] = "none"
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name(_device_of(world))
    steering = ("NCCL_", "TORCH_NCCL_")
    return facts | {n: value for n, value in os.environ.items() if n.startswith(steering)}


def look_at_machine(world: World) -> list[Finding]:
    """Look at everything of this rank that needs no other rank and no folder."""
    findings = [_versions()]
    findings += _devices(world)
    findings += _cores_and_memory(world, os.environ)
    interfaces = [name for _, name in socket.if_nameindex()]
    findings += look_at_environment(os.environ, world, interfaces)
    return findings


def _versions() -> Finding:
    """Compare what is installed with what this package asks for."""
    found = installed_versions()
    shown = ", ".join(f"{name} {found[name]}" for name in ("dist-siglip", "torch", "lightning"))
    text = f"{shown}, python {platform.python_version()}, code {digest_of_sources()}"
    if found["dist-siglip"] is None:
        remedy = "pip install it, so that what it needs comes along"
        return Finding("warn", "versions", f"{text}; run from its sources", remedy)
    wrong = list(unfit_packages(importlib.metadata.requires("dist-siglip") or []))
    if wrong:
        remedy = "pip install -U dist-siglip, with what it needs, in this environment"
        return Finding("FAIL", "versions", f"{text}; {'; '.join(wrong)}", remedy)
    return Finding("ok", "versions", text)


def unfit_packages(requirements: list[str]) -> Iterator[str]:
    """Name what is required and not there, or there in another version.

    Example:
        >>> list(unfit_packages(["torch>=9999", "pip; extra == 'x'"]))[0].split(", ")[1]
        'torch>=9999 is needed'
    """
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{requirement.name} is missing, {requirement} is needed"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is {version}, {requirement} is needed"


def _devices(world: World) -> Iterator[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield look_without_gpu(Path("/dev/nvidiactl").exists(), torch.version.cuda, os.environ)
        return
    if world.local_rank >= count:
        yield Finding(
            "FAIL",
            "devices",
            f"local rank {world.local_rank} of {world.local_world_size} sees {count} of the GPUs "
            "of its node",
            "every rank must see as many GPUs as its node has ranks: --gpus-per-node, and no "
            "--gpus-per-task",
        )
        return
    # Alone, for all of them; else each rank for its own.
    chosen = range(count) if world.world_size == 1 else [world.local_rank]
    found = [_look_at_gpu(torch.device("cuda", index), count) for index in chosen]
    yield from [finding for finding in found if finding.status != "ok"] or found[:1]


def _look_at_gpu(device: torch.device, count: int) -> Finding:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    text = (
        f"{count} x {properties.name}, {total / _GIB:.0f} GiB, {free / _GIB:.0f} GiB free on "
        f"{device}, driver {_driver()}, CUDA {torch.version.cuda}"
    )
    error = _largest_error_of_a_product(device)
    if error > _LARGEST_ERROR:
        text = f"{text}; a product of matrices is wrong by {error:.1e}"
        return Finding("FAIL", "devices", text, "take this GPU out of service")
    if free < 0.9 * total:
        remedy = "another process uses this GPU: nvidia-smi shows which"
        return Finding("warn", "devices", text, remedy)
    return Finding("ok", "devices", text)


def look_without_gpu(
    has_driver: bool, cuda_of_torch: str | None, environ: Mapping[str, str]
) -> Finding:
    """Judge that torch sees no GPU.

    Example:
        >>> look_without_gpu(False, None, {}).status, look_without_gpu(True, None, {}).status
        ('ok', 'FAIL')
    """
    hidden = environ.get("CUDA_VISIBLE_DEVICES")
    if hidden == "" or hidden == "-1":
        text = "CUDA_VISIBLE_DEVICES hides every GPU from this rank"
        return Finding("warn", "devices", text, "unset it, or ask for GPUs: --gpus-per-node")
    if has_driver and cuda_of_torch is None:
        text = "there is an NVIDIA driver, and this torch is built without CUDA"
        return Finding("FAIL", "devices", text, "install PyPI's torch and torchvision as a pair")
    if has_driver:
        text = f"there is an NVIDIA driver, and torch (CUDA {cuda_of_torch}) sees no GPU"
        remedy = "run nvidia-smi; ask the job for GPUs; the driver may be too old for this torch"
        return Finding("FAIL", "devices", text, remedy)
    return Finding("ok", "devices", "no GPU; training runs on the CPU")


def _device_of(world: World) -> int:
    """Index of this rank's GPU, as Lightning takes it."""
    return min(world.local_rank, torch.cuda.device_count() - 1)


def gpu_of(world: World) -> str:
    """Return what tells this rank's GPU from others; "" without one."""
    if not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_properties(_device_of(world)).uuid)


def _driver() -> str:
    """Version of the NVIDIA driver, from the kernel module."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return next((word for word in text.split() if word.count(".") >= 1 and word[0].isdigit()), "?")


def _largest_error_of_a_product(device: torch.device) -> float:
    """Multiply two matrices there and here; return the largest relative difference."""
    left, right = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    there = (left.to(device) @ right.to(device)).cpu()
    # Entries are about 20.
    return float((there - left @ right).abs().max()) / 20


def _cores_and_memory(world: World, environ: Mapping[str, str]) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    is_bound = int(environ.get("SLURM_CPUS_PER_TASK") or 0) == cores
    of_rank = cores if is_bound else max(1, cores // world.local_world_size)
    free = Path("/dev/shm")
    shared = os.statvfs(free) if free.is_dir() else None
    shared_bytes = shared.f_bavail * shared.f_frsize if shared else 0
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = (
        f"{of_rank} cores for this rank, {_available_memory() / _GIB:.0f} GiB of memory, "
        f"{shared_bytes / _GIB:.1f} GiB of shared memory, {files} open files"
    )
    problems = list(look_at_limits(of_rank, shared_bytes, files))
    yield from problems or [Finding("ok", "host", text)]


def look_at_limits(cores: int, shared_bytes: int, open_files: int) -> Iterator[Finding]:
    """Judge what loader processes depend on.

    Args:
        cores: for one rank.
        shared_bytes: free in /dev/shm.
        open_files: that a process may have.

    Example:
        >>> [finding.text for finding in look_at_limits(8, 2**26, 1 << 20)]
        ['64 MiB of shared memory are free in /dev/shm']
    """
    if cores < 2:
        yield Finding(
            "warn",
            "host",
            f"{cores} core for this rank: its loader processes wait for it",
            "ask for more, e.g. --cpus-per-task=8, and export SRUN_CPUS_PER_TASK for srun",
        )
    if shared_bytes < _LEAST_SHARED_MEMORY:
        yield Finding(
            "warn",
            "host",
            f"{shared_bytes / 2**20:.0f} MiB of shared memory are free in /dev/shm",
            "give the container more (docker: --shm-size, --ipc=host), or loaders crash (SIGBUS)",
        )
    if open_files < _LEAST_OPEN_FILES:
        yield Finding(
            "warn", "host", f"only {open_files} open files are allowed", "raise ulimit -n to 65536"
        )


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def look_at_environment(
    environ: Mapping[str, str], world: World, interfaces: list[str]
) -> Iterator[Finding]:
    """Show what steers libraries below, and judge it.

    Args:
        environ: variables of this rank.
        world: this rank.
        interfaces: names of the network interfaces of this host.
    """
    problems: list[Finding] = []
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if fault := interface_fault(name, environ.get(name), interfaces, world.num_nodes):
            remedy = f"name one of {', '.join(interfaces)}, or unset it"
            problems.append(Finding("FAIL", "environment", fault, remedy))
    problems += [
        Finding("warn", "environment", f"{name}={environ[name]}: {cost}", "unset it if not needed")
        for name, cost in _SLOW.items()
        if environ.get(name, "0") != "0"
    ]
    if environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF") == "DETAIL":
        text = "TORCH_DISTRIBUTED_DEBUG=DETAIL: every collective is checked by another"
        problems.append(Finding("warn", "environment", text, "unset it if not needed"))
    if world.local_world_size > 1 and "OMP_NUM_THREADS" not in environ:
        cores = len(os.sched_getaffinity(0))
        if torch.get_num_threads() * world.local_world_size > cores:
            text = (
                f"OMP_NUM_THREADS is not set: {world.local_world_size} ranks of "
                f"{torch.get_num_threads()} threads on {cores} cores"
            )
            remedy = f"export OMP_NUM_THREADS={max(1, cores // world.local_world_size)}"
            problems.append(Finding("warn", "environment", text, remedy))
    shown = {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(_SHOWN_PREFIXES) or name in _SHOWN_NAMES
    }
    listed = ", ".join(f"{name}={value}" for name, value in shown.items())
    yield from problems or [Finding("ok", "environment", listed or "nothing of NCCL, OMP, SLURM")]


def interface_fault(
    name: str, value: str | None, interfaces: list[str], num_nodes: int
) -> str | None:
    """Say what is wrong with the choice of a network interface; None if nothing is.

    NCCL takes prefixes, "=" before an exact name and "^" before those to leave out; gloo a name.

    Example:
        >>> interface_fault("NCCL_SOCKET_IFNAME", "ib", ["lo", "ib0"], 2)
        >>> interface_fault("NCCL_SOCKET_IFNAME", "=ib", ["lo", "ib0"], 2)
        'NCCL_SOCKET_IFNAME==ib names no interface of this host'
        >>> interface_fault("GLOO_SOCKET_IFNAME", "lo", ["lo", "ib0"], 2)
        'GLOO_SOCKET_IFNAME=lo does not leave this host, and there are 2 nodes'
    """
    if not value or value.startswith("^"):
        return None
    is_exact = value.startswith("=") or name.startswith("GLOO")
    wanted = value.lstrip("=").split(",")
    chosen = [
        interface
        for interface in interfaces
        if any(interface == w if is_exact else interface.startswith(w) for w in wanted)
    ]
    if not chosen:
        return f"{name}={value} names no interface of this host"
    if chosen == ["lo"] and num_nodes > 1:
        return f"{name}={value} does not leave this host, and there are {num_nodes} nodes"
    return None


_BYTES_OF_OTHERS = 2**20  # written by nodes that write no checkpoint


class Plan(NamedTuple):
    """What is to be looked at.

    Attributes:
        run_dir: run folder; None looks at none.
        shard_sets: shards of each setting.
        num_shards: of each, that are opened.
        write_bytes: written to the run folder.
    """

    run_dir: Path | None
    shard_sets: tuple[ShardSet, ...]
    num_shards: int
    write_bytes: int


class Look(NamedTuple):
    """What one rank found, in plain values.

    Attributes:
        findings: lines of the page.
        facts: what must be the same on all ranks.
        shard_facts: likewise of the shards; None of a rank that leaves them to another.
        gpu: identity of its GPU; "" without one.
    """

    findings: list[Finding]
    facts: dict[str, str]
    shard_facts: dict[str, str] | None
    gpu: str


def look_around(world: World, plan: Plan, kept_file: str | None, checks: BoundedChecks) -> Look:
    """Look at machine, run folder and shards.

    Args:
        world: this rank.
        plan: what to look at.
        kept_file: that the first rank keeps in the run folder, if the ranks are several.
        checks: the time there is.
    """
    checks.take("host", lambda: look_at_machine(world))
    if plan.run_dir is None:
        checks.findings.append(
            Finding("-", "run folder", "not looked at: give --run_dir or --config")
        )
    else:
        _look_at_folder(world, plan, plan.run_dir, kept_file, checks)
    shard_facts: dict[str, str] | None = None
    if world.local_rank == 0:
        shard_facts = {}
        for shard_set in plan.shard_sets:
            remedy = "the storage of these shards hangs: look at its mount or its server"
            found = checks.run(
                shard_set.name,
                lambda chosen=shard_set: look_at_shards(chosen, plan.num_shards),  # type: ignore[misc]
                remedy=remedy,
            )
            findings, facts = found or ([], {})
            checks.findings += findings
            shard_facts |= facts
        if not plan.shard_sets:
            checks.findings.append(
                Finding("-", "shards", "not looked at: give --shards or --config")
            )
    facts = checks.run("host", lambda: machine_facts(world)) or {}
    return Look(checks.findings, facts, shard_facts, gpu_of(world))


def _look_at_folder(
    world: World, plan: Plan, run_dir: Path, kept_file: str | None, checks: BoundedChecks
) -> None:
    remedy = f"the file system of {run_dir} hangs: look at its mount or its server"
    if world.is_first:
        checks.take("run folder", lambda: look_at_folder(run_dir, plan.write_bytes), remedy=remedy)
    elif world.local_rank == 0:
        checks.take(
            "run folder",
            # The speed of so little says nothing.
            lambda: [
                finding
                for finding in look_at_folder(run_dir, _BYTES_OF_OTHERS)
                if finding.status == "FAIL"
            ],
            remedy=remedy,
        )
    if kept_file is not None:
        checks.take("shared folder", lambda: look_for_file(Path(kept_file)), remedy=remedy)


def unpack_look(value: dict[str, Any]) -> Look:
    """Make a look of what went through JSON."""
    return Look(**{**value, "findings": [Finding(*finding) for finding in value["findings"]]})
