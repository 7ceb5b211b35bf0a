"""``bench loss``: our loss beside others on the same features, in one run.

Losses take turns within every round, so that a busy machine is busy for all of them; what is
reported is the median round, and of its ranks the slowest. Matrix products alone are a bound.
Memory is measured in a step of its own: the peak beside the inputs, forward and backward.

Each baseline is a function (image_features, text_features, logit_scale, logit_bias) -> loss of
this rank; gradients come from ``backward``.
"""

import json as json_text
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as with_grad
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from dist_siglip.bench.plan import mebibytes
from dist_siglip.bench.simulate import LiveBytes, measure_host_us
from dist_siglip.distributed import ExchangeName, leave_process_groups
from dist_siglip.distributed.speeds import remember
from dist_siglip.errors import UserError
from dist_siglip.losses import siglip_loss
from dist_siglip.losses.kernels.pair_terms import Kernel, choose_kernel
from dist_siglip.losses.kernels.tiles import product, uses_onednn
from dist_siglip.losses.logit_scale import START_BIAS, START_SCALE

Contestant = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

OPEN_CLIP = "open_clip bidir"


def baselines(
    rank: int,
    world_size: int,
    device: torch.device,
    exchanges: tuple[ExchangeName, ...],
    kernels: tuple[Kernel, ...] = ("auto",),
) -> dict[str, Contestant]:
    """Return the losses that can run here, by name; ours first."""
    from open_clip.loss import SigLipLoss

    found: dict[str, Contestant] = {
        f"dist_siglip {name}{'' if kernel == 'auto' else f', {kernel}'}": partial(
            siglip_loss, exchange=name, kernel=kernel
        )
        for name in exchanges
        for kernel in kernels
    }
    found[OPEN_CLIP] = SigLipLoss(False, rank, world_size, "bidir")
    if world_size > 1:
        found["open_clip gather"] = SigLipLoss(False, rank, world_size, "gather")
    found["plain chunks"] = partial(chunked_loss, rank=rank)
    if device.type == "cuda" and find_spec("siglip_kernel") is not None:
        found["siglip-kernel"] = _siglip_kernel(rank, world_size)
    return found


def chunked_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    rank: int,
    chunk_rows: int = 1024,
) -> Tensor:
    """The sigmoid loss as a plain loop over row chunks, all texts gathered, autograd behind it.

    As open_clip and big_vision cut it; every chunk's logits live until backward.
    """
    texts = (text_features,)
    if dist.is_initialized() and dist.get_world_size() > 1:
        texts = with_grad.all_gather(text_features)
    total = image_features.new_zeros((), dtype=torch.float32)
    for owner, text in enumerate(texts):
        for start in range(0, image_features.shape[0], chunk_rows):
            rows = image_features[start : start + chunk_rows]
            logits = logit_scale * rows @ text.T + logit_bias
            signs = -torch.ones_like(logits)
            if owner == rank:
                signs.diagonal(start).fill_(1)
            total = total - F.logsigmoid(signs * logits).sum()
    return total / image_features.shape[0]


def matmul_limits(
    image_features: Tensor, text_features: Tensor, world_size: int
) -> dict[str, Callable[[], None]]:
    """Return the three products of the loss for every shard and nothing else, by library.

    Shapes (B, D) x (D, B), (B, B) x (B, D) and its transpose, into memory that is there already.
    """
    image, text = image_features.detach(), text_features.detach()
    logits = image.new_zeros(image.shape[0], text.shape[0])
    gradient = torch.zeros_like(image)

    def by_torch() -> None:
        for _ in range(world_size):
            torch.mm(image, text.T, out=logits)
            torch.mm(logits, text, out=gradient)
            torch.mm(logits.T, image, out=gradient)

    def by_onednn() -> None:
        for _ in range(world_size):
            product(image, text)
            product(logits, text.T)
            product(logits.T, image.T)

    found = {"three matmuls": by_torch}
    if uses_onednn(image):
        found["three matmuls, oneDNN"] = by_onednn
    return found


def _siglip_kernel(rank: int, world_size: int) -> Contestant:
    kernel = import_module("siglip_kernel")
    if world_size > 1:
        ring: Contestant = kernel.DistributedSigLIPLoss(
            strategy="ring", rank=rank, world_size=world_size
        )
        return ring

    def one_rank(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        loss: Tensor = kernel.fused_siglip_loss(image, text, scale.log(), bias)
        return loss

    return one_rank


BenchDtype = Literal["float32", "bfloat16"]


class LossCase(NamedTuple):
    """What all baselines are given."""

    world_size: int
    local_batch_size: int
    embed_dim: int
    dtype: BenchDtype
    exchanges: tuple[ExchangeName, ...]
    kernels: tuple[Kernel, ...]
    logit_scale: float
    logit_bias: float
    rounds: int
    device: str


def loss(
    world_sizes: Sequence[int] = (1,),
    local_batch_size: int = 4096,
    embed_dim: int = 512,
    dtypes: Sequence[BenchDtype] = ("float32",),
    exchanges: Sequence[ExchangeName] = ("auto",),
    kernel: Literal["auto", "triton", "compiled", "eager", "all"] = "auto",
    logit_scale: float = START_SCALE,
    logit_bias: float = START_BIAS,
    rounds: int = 9,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> int:
    """Time the sigmoid loss, forward and backward, beside open_clip's and a plain chunked one.

    Args:
        world_sizes: numbers of processes; 1 uses all cores of a CPU, others one core each.
        local_batch_size: pairs per process.
        embed_dim: width of the features.
        dtypes: of the features.
        exchanges: of our loss; with one process they are all the same.
        kernel: who computes the terms of our tiles: auto, triton, compiled or eager; all for a row
            of each that this machine has.
        logit_scale: multiplier of the similarities.
        logit_bias: number added to the logits.
        rounds: how often each baseline is timed; the median counts.
        device: cpu, cuda (one process per GPU), or auto for cuda where there is one.
        json: print JSON instead of a table.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = {"local_batch_size": local_batch_size, "embed_dim": embed_dim, "rounds": rounds}
    for name, value in [*numbers.items(), *(("world_sizes", size) for size in world_sizes)]:
        if value < 1:
            raise UserError(f"{name} ({value}) must be at least 1")
    if device == "cuda" and max(world_sizes) > torch.cuda.device_count():
        raise UserError(
            f"world_sizes ({max(world_sizes)}) must be at most the {torch.cuda.device_count()} "
            "GPUs of this machine; or set device to cpu"
        )
    kernels = _kernels(kernel, torch.device(device))
    rows: list[dict[str, Any]] = []
    for world_size in world_sizes:
        for dtype in dtypes:
            rows += _measure(
                LossCase(
                    world_size=world_size,
                    local_batch_size=local_batch_size,
                    embed_dim=embed_dim,
                    dtype=dtype,
                    exchanges=tuple(exchanges)[: None if world_size > 1 else 1],
                    kernels=kernels,
                    logit_scale=logit_scale,
                    logit_bias=logit_bias,
                    rounds=rounds,
                    device=device,
                )
            )
    kept = _remember(rows, torch.device(device))
    if json:
        sys.stdout.write(json_text.dumps(rows, indent=2) + "\n")
        return 0
    Console().print(_table(rows, device, rounds))
    if kept is not None:
        Console().print(f"what exchange auto is to reckon with: {kept}", soft_wrap=True)
    return 0


def _kernels(kernel: Kernel | Literal["all"], device: torch.device) -> tuple[Kernel, ...]:
    if kernel != "all":
        choose_kernel(kernel, torch.empty(0, device=device))
        return (kernel,)
    best = choose_kernel("auto", torch.empty(0, device=device))
    others: tuple[Kernel, ...] = ("compiled", "eager")
    return (best, *(name for name in others if name != best))


def _remember(rows: list[dict[str, Any]], device: torch.device) -> Path | None:
    """Keep what the host and the matmuls took, for the choice of ``auto``."""
    flops_per_second = [
        6.0 * row["local_batch_size"] ** 2 * row["embed_dim"] * row["world_size"]
        / (row["milliseconds"] / 1e3)
        for row in rows
        if row["loss"] is None
    ]  # fmt: skip
    return remember(
        device.type,
        teraflops=max(flops_per_second) / 1e12,
        host_us=measure_host_us(device),
    )


def _measure(case: LossCase) -> list[dict[str, Any]]:
    """Run one case on as many processes as it says; return a row per baseline."""
    if case.world_size == 1:
        return _compare(0, case)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_enter, args=(case, folder), nprocs=case.world_size, start_method="spawn")
        rows: list[dict[str, Any]] = json_text.loads((Path(folder) / "rows.json").read_text())
    return rows


def _enter(rank: int, case: LossCase, folder: str) -> None:
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if case.device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=case.world_size,
        timeout=timedelta(minutes=10),
    )
    try:
        rows = _compare(rank, case)
        if rank == 0:
            (Path(folder) / "rows.json").write_text(json_text.dumps(rows))
        dist.barrier()
    finally:
        leave_process_groups()


def _compare(rank: int, case: LossCase) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        # The gather of open_clip and of the plain loss has a newer name.
        warnings.filterwarnings("ignore", r"torch\.distributed\.nn", FutureWarning)
        return _rank_rows(rank, case)


def _rank_rows(rank: int, case: LossCase) -> list[dict[str, Any]]:
    device = torch.device(case.device)
    inputs = _inputs(rank, case, device)
    named = baselines(rank, case.world_size, device, case.exchanges, case.kernels)
    values: dict[str, float] = {}

    def step(name: str) -> Callable[[], None]:
        def forward_and_backward() -> None:
            for tensor in inputs:
                tensor.grad = None
            value = named[name](*inputs)
            value.backward()
            values[name] = value.item()

        return forward_and_backward

    steps = {name: step(name) for name in named}
    limits = matmul_limits(inputs[0], inputs[1], case.world_size)
    seconds = _rounds({**limits, **steps}, case.rounds, device)
    peaks = {name: _over_ranks(_peak_bytes(run, device)) for name, run in steps.items()}
    limit = min(seconds[name] for name in limits)
    common = {
        "world_size": case.world_size,
        "local_batch_size": case.local_batch_size,
        "embed_dim": case.embed_dim,
        "dtype": case.dtype,
    }
    return [
        {
            **common,
            "contestant": name,
            "milliseconds": 1e3 * taken,
            "peak_bytes": peaks.get(name),
            "ratio": taken / seconds[OPEN_CLIP],
            "matmul_share": limit / taken,
            "loss": values.get(name),
        }
        for name, taken in seconds.items()
    ]


def _inputs(rank: int, case: LossCase, device: torch.device) -> tuple[Tensor, ...]:
    """Unit features, each text somewhat like its image; the leaves of every baseline."""
    generator = torch.Generator().manual_seed(rank)
    shape = (2, case.local_batch_size, case.embed_dim)
    image, noise = F.normalize(torch.randn(shape, generator=generator), dim=-1)
    text = F.normalize(image + 3 * noise, dim=-1)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[case.dtype]
    features = (side.to(device, dtype) for side in (image, text))
    scalars = torch.tensor([case.logit_scale, case.logit_bias], device=device)
    return tuple(value.clone().requires_grad_() for value in (*features, *scalars))


def _rounds(
    runs: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Seconds of the median round, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            _wait(device)
            if dist.is_initialized():
                dist.barrier()
            started = time.perf_counter()
            run()
            _wait(device)
            taken[name].append(_over_ranks(time.perf_counter() - started))
    return {name: median(times[1:]) for name, times in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    if device.type != "cuda":
        with LiveBytes() as counter:
            run()
        return counter.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _over_ranks(value: float) -> float:
    """Largest of all ranks' values."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def _table(rows: list[dict[str, Any]], device: str, rounds: int) -> Table:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} cores"
    table = Table(
        title=f"sigmoid loss, forward and backward, on {device} ({where})",
        caption=(
            f"W processes of b pairs, d wide; median of {rounds} rounds, slowest rank; peak: the "
            "loss beside its inputs; ratio: time over open_clip bidir's; of matmul: share of the "
            "time that its three matrix products alone take, by the fastest library at hand"
        ),
    )
    for heading in ("W", "b", "d", "dtype", "loss and exchange"):
        table.add_column(heading, justify="left" if heading.startswith(("d", "l")) else "right")
    for heading in ("ms", "peak", "ratio", "of matmul"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["world_size"]),
            str(row["local_batch_size"]),
            str(row["embed_dim"]),
            row["dtype"],
            row["contestant"],
            f"{row['milliseconds']:.1f}",
            "" if row["peak_bytes"] is None else mebibytes(row["peak_bytes"]),
            f"{row['ratio']:.2f}",
            f"{row['matmul_share']:.0%}",
        )
    return table
