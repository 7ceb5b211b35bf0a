"""Parts of the acceptance run about the loss and how features travel.

Each returns plain values for JSON, "summary" being a sentence.
"""

import json
import multiprocessing
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_siglip.distributed import ExchangeName, leave_process_groups
from dist_siglip.distributed.combine import all_gather_single
from dist_siglip.distributed.groups import control_of, transfers_of
from dist_siglip.distributed.simulate import simulated_world
from dist_siglip.doctor.gpu_sizes import PartError, Sizes, make_leaves, read_command, wait_for
from dist_siglip.losses import siglip_loss


def time_losses(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Time the loss beside open_clip's and whatever else is installed."""
    rows: list[dict[str, Any]] = []
    for rows_of_rank, width in sizes.loss_shapes:
        options = {
            "local_batch_size": rows_of_rank,
            "embed_dim": width,
            "dtypes": '["bfloat16"]',
            "rounds": sizes.loss_rounds,
            "device": device.type,
            "kernel": "all",
        }
        rows += read_command("bench", "loss", **options)
    last = [row for row in rows if row["local_batch_size"] == sizes.loss_shapes[-1][0]]
    own = [row for row in last if str(row["contestant"]).startswith("dist_siglip")]
    ours = min(own, key=lambda row: float(row["milliseconds"]))
    text = (
        f"{ours['contestant']}, b = {ours['local_batch_size']}, D = {ours['embed_dim']}: "
        f"{ours['milliseconds']:.2f} ms, "
        f"{ours['matmul_share']:.0%} of what its products alone reach, {ours['ratio']:.2f} of "
        "open_clip's time"
    )
    return {"losses": rows, "summary": text}


def profile_loss(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """List the kernels of one loss, forward and backward."""
    rows_of_rank, width = sizes.loss_shapes[0]
    leaves = make_leaves(device, rows_of_rank, width, torch.bfloat16)
    for _ in range(3):
        siglip_loss(*leaves).backward()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        siglip_loss(*leaves).backward()
        wait_for(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    kernels = [
        {
            "name": str(event.key)[:80],
            "calls": event.count,
            "microseconds": round(getattr(event, key), 1),
            "share": round(getattr(event, key) / max(total, 1e-9), 3),
        }
        for event in events[:15]
    ]
    text = f"{total / 1e3:.2f} ms, most of it in {kernels[0]['name'][:50]}"
    return {"local_batch_size": rows_of_rank, "embed_dim": width, "ops": kernels, "summary": text}


def time_hops(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Time what the host does for a hop of a large world, and measure the memory of a step."""
    exchanges: tuple[ExchangeName, ...] = ("ring", "two_level", "all_gather")
    hops = []
    for exchange in exchanges:
        with simulated_world(sizes.world_size, local_world_size=min(8, sizes.world_size)):
            leaves = make_leaves(device, sizes.hop_rows, sizes.embed_dim, torch.bfloat16)
            taken = []
            for _ in range(4):
                wait_for(device)
                started = time.perf_counter()
                siglip_loss(*leaves, exchange=exchange)
                taken.append(time.perf_counter() - started)
            row = {
                "exchange": exchange,
                "host_microseconds_a_hop": round(1e6 * min(taken[1:]) / sizes.world_size, 1),
            }
            if device.type == "cuda":
                leaves = make_leaves(device, sizes.memory_rows, sizes.embed_dim, torch.bfloat16)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                siglip_loss(*leaves, exchange=exchange).backward()
                wait_for(device)
                row["step_mib"] = round((torch.cuda.max_memory_allocated(device) - before) / 2**20)
            hops.append(row)
    text = f"{hops[0]['host_microseconds_a_hop']} us of the host a hop of {sizes.world_size} ranks"
    return {"world_size": sizes.world_size, "hops": hops, "summary": text}


def use_companions(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Use companion groups while the device is busy, and overwrite what was sent at once."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=0,
            world_size=1,
            device_id=device if device.type == "cuda" else None,
        )
        try:
            world = dist.group.WORLD
            assert world is not None  # just initialised
            started = time.perf_counter()
            made = control_of(world), transfers_of(world, device, across_nodes=True)
            wait_for(device)
            seconds = time.perf_counter() - started
            wrong = _overwrite_under_load(made[1].group, device, sizes)
        finally:
            leave_process_groups()
    if wrong:
        raise PartError(f"{wrong} of {sizes.transfers} transfers arrived changed", {"wrong": wrong})
    text = f"made in {1e3 * seconds:.0f} ms; {sizes.transfers} transfers under load arrived whole"
    return {"connect_seconds": seconds, "transfers": sizes.transfers, "summary": text}


def _overwrite_under_load(group: dist.ProcessGroup, device: torch.device, sizes: Sizes) -> int:
    """Transfers whose content was not that of the moment they were posted."""
    side = 2048 if device.type == "cuda" else 32
    load = torch.randn(side, side, device=device)
    source = torch.empty(sizes.hop_rows, sizes.embed_dim, device=device)
    arrived = torch.empty_like(source)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for number in range(sizes.transfers):
        load = F.normalize(load @ load)  # before it, and after
        source.fill_(number)
        work = all_gather_single(arrived, source, group=group, async_op=True)
        load = F.normalize(load @ load)
        assert work is not None
        work.wait()
        source.fill_(-1)
        wrong += (arrived != number).any()
    return int(wrong)


def share_one_device(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Try two ranks on one device, which NCCL takes for two hosts, and compare with one process."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=_be_a_rank, args=(rank, folder, device.type, sizes))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        until = time.monotonic() + (42 if device.type == "cuda" else 120)
        for process in ranks:
            process.join(max(0.0, until - time.monotonic()))
        is_hung = any(process.is_alive() for process in ranks)
        for process in ranks:
            process.kill()
            process.join()
        said = [path.read_text() for path in sorted(Path(folder).glob("rank-*.json"))]
    found = [json.loads(text) for text in said]
    errors = [each["error"] for each in found if "error" in each]
    if is_hung or errors or len(found) < 2:
        reason = errors[0] if errors else "they do not come back" if is_hung else "they ended early"
        return {"ranks": 1, "refused": reason[:600], "summary": f"world 1 only: {reason[:120]}"}
    rows = [row for each in found for row in each["rows"]]
    largest = max(row["largest_difference"] for row in rows)
    if largest > 1e-5:
        raise PartError(f"two ranks differ from one process by {largest:.1e}", {"rows": rows})
    text = f"two ranks on one device agree with one process to {largest:.0e}"
    return {"ranks": 2, "rows": rows, "summary": text}


def _be_a_rank(rank: int, folder: str, kind: str, sizes: Sizes) -> None:
    """Compare loss and gradients of two ranks with those of one process."""
    os.environ |= {
        "NCCL_HOSTID": f"accept-{rank}",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
    }
    result: dict[str, Any] = {}
    try:
        device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
        whole = make_leaves(device, 2 * sizes.hop_rows, sizes.embed_dim, torch.float32)
        expected = siglip_loss(*whole)
        expected.backward()
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=20),
        )
        mine = slice(rank * sizes.hop_rows, (rank + 1) * sizes.hop_rows)
        rows = []
        exchanges: tuple[ExchangeName, ...] = ("ring", "all_gather")
        for exchange in exchanges:
            leaves = [
                (side[mine] if side.ndim else side).detach().clone().requires_grad_()
                for side in whole
            ]
            loss = siglip_loss(*leaves, exchange=exchange)
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            differences = [(total / 2 - expected.detach()).abs().max()]
            for own, side in zip(leaves[:2], whole[:2], strict=True):
                assert own.grad is not None and side.grad is not None  # noqa: PT018 - for mypy
                differences.append((own.grad / 2 - side.grad[mine]).abs().max())
            rows.append(
                {
                    "rank": rank,
                    "exchange": exchange,
                    "largest_difference": float(torch.stack(differences).max()),
                }
            )
        result["rows"] = rows
    except Exception as error:  # noqa: BLE001 - what NCCL says is what is wanted
        result["error"] = " ".join(f"{type(error).__name__}: {error}".split())
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(result))
    os._exit(0)  # a communicator that was refused is not waited for
