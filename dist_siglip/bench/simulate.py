"""``bench simulate``: one rank of a large world, run here, against what ``bench plan`` predicts.

PyTorch's fake process group stands for the other ranks. Memory is measured over a whole step;
the tile compute of the first ``visits`` visits is real, the others are skipped.
"""

import json as json_text
import sys
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dist_siglip.bench.live_bytes import LiveBytes
from dist_siglip.bench.plan import mebibytes
from dist_siglip.distributed.cost_model import Cluster, Problem, predict
from dist_siglip.distributed.simulate import simulated_world
from dist_siglip.errors import UserError
from dist_siglip.losses import siglip_loss

SimulatedExchange = Literal["ring", "two_way", "two_level", "all_gather"]


class Simulated(NamedTuple):
    """What one step of a simulated world took.

    Attributes:
        world_size: ranks.
        peak_bytes: peak memory of the loss beside its inputs, forward and backward.
        predicted_bytes: what ``bench plan`` says.
        open_clip_bytes: what ``bench plan`` says of open_clip's loss.
        visits: shards whose tiles were computed.
        step_seconds: forward and backward, with these visits and all transfers.
    """

    world_size: int
    peak_bytes: int
    predicted_bytes: int
    open_clip_bytes: int
    visits: int
    step_seconds: float


def simulate(
    world_sizes: Sequence[int] = (64, 256, 1024),
    local_world_size: int = 8,
    local_batch_size: int = 4096,
    embed_dim: int = 768,
    exchange: SimulatedExchange = "ring",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    chunk_rows: int = 1024,
    visits: int | None = 1,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Run one rank's step of the loss in simulated worlds; compare its memory with the plan.

    Args:
        world_sizes: ranks of each simulated world.
        local_world_size: ranks per node; divides every world size.
        local_batch_size: pairs per rank.
        embed_dim: width of the features.
        exchange: which exchange.
        dtype: of the features.
        chunk_rows: side of the largest tile of logits.
        visits: shards whose tiles are really computed; null computes all of them.
        device: cpu, cuda, or auto for cuda where there is one.
        json: print JSON instead of a table.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(
        local_batch_size=local_batch_size,
        embed_dim=embed_dim,
        feature_bytes=2 if dtype == "bfloat16" else 4,
        chunk_rows=chunk_rows,
    )
    rows = [
        simulate_step(
            Cluster(world_size=world_size, local_world_size=local_world_size),
            problem,
            exchange,
            visits,
            torch.device(device),
        )
        for world_size in world_sizes
    ]
    if json:
        text = json_text.dumps([row._asdict() for row in rows], indent=2)
        sys.stdout.write(f"{text}\n")
        return 0
    Console().print(_table(rows, problem, exchange, device))
    return 0


def simulate_step(
    cluster: Cluster,
    problem: Problem,
    exchange: SimulatedExchange,
    visits: int | None,
    device: torch.device,
) -> Simulated:
    """Run one step of rank 0; see ``simulate``.

    Raises:
        UserError: if visits < 1 or a process group runs already.
    """
    if visits is not None and visits < 1:
        raise UserError(f"visits ({visits}) must be at least 1, or null for all")
    inputs = _inputs(problem, device)
    world = simulated_world(
        cluster.world_size, local_world_size=cluster.local_world_size, max_visits=visits
    )
    with world:
        peak, seconds = _measure(inputs, problem, exchange, device)
    done = min(visits or cluster.world_size, cluster.world_size)
    return Simulated(
        world_size=cluster.world_size,
        peak_bytes=peak,
        predicted_bytes=predict(exchange, cluster, problem).memory_bytes,
        open_clip_bytes=predict("open_clip bidir", cluster, problem).memory_bytes,
        visits=done,
        step_seconds=seconds,
    )


def _inputs(problem: Problem, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if problem.feature_bytes == 2 else torch.float32
    shape = (2, problem.local_batch_size, problem.embed_dim)
    image, text = F.normalize(torch.randn(shape, generator=generator), dim=-1).to(device, dtype)
    scalars = torch.tensor([10.0, -10.0], device=device)
    return tuple(value.clone().requires_grad_() for value in (image, text, *scalars))


def _measure(
    inputs: tuple[Tensor, ...],
    problem: Problem,
    exchange: SimulatedExchange,
    device: torch.device,
) -> tuple[int, float]:
    """Return peak bytes beside the inputs, and seconds, of one step."""

    def step() -> None:
        loss = siglip_loss(*inputs, exchange=exchange, chunk_rows=problem.chunk_rows)
        loss.backward()

    started = time.monotonic()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with LiveBytes() as counter:
            step()
        peak = counter.peak
    return peak, time.monotonic() - started


def _table(rows: list[Simulated], problem: Problem, exchange: str, device: str) -> Table:
    table = Table(
        title=(
            f"one rank's step of the sigmoid loss in simulated worlds: exchange {exchange}, "
            f"{problem.local_batch_size} pairs per rank, {problem.embed_dim} wide, {device}"
        ),
        caption=(
            "memory: peak of the loss beside its inputs, forward and backward; step: time with "
            "the tiles of the computed visits, and all transfers as copies inside this machine"
        ),
    )
    for heading in (
        "ranks", "memory", "predicted", "ratio", "open_clip predicted", "visits computed", "step",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.world_size:,}",
            mebibytes(row.peak_bytes),
            mebibytes(row.predicted_bytes),
            f"{row.peak_bytes / row.predicted_bytes:.2f}",
            mebibytes(row.open_clip_bytes),
            f"{row.visits:,}",
            f"{row.step_seconds:.2f} s",
        )
    return table
