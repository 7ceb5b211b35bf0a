"""``bench simulate``: one rank of a large world, run here, against what ``bench plan`` predicts.

PyTorch's fake process group stands for the other ranks. Memory is measured over a whole step;
the tile compute of the first ``visits`` visits is real, the others are skipped.

On a CPU, where no allocator tells, the bytes of living tensors are counted.
"""

import json as json_text
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dist_siglip.bench.plan import mebibytes
from dist_siglip.distributed.cost_model import Cluster, Problem, predict
from dist_siglip.distributed.simulate import simulated_world
from dist_siglip.errors import UserError
from dist_siglip.losses import siglip_loss


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside the block made and that still live.

    Exact for tensors: every storage counts once, however many views it has, from the operation
    that made it until it is freed. Tensors from before the block and a kernel's own scratch
    memory do not count.

    Attributes:
        live: bytes now.
        peak: largest ``live`` so far.

    Example:
        >>> import torch
        >>> with LiveBytes() as counter:
        ...     first = torch.zeros(100)
        ...     total = (first + 1).sum()
        >>> counter.peak - counter.live, counter.live
        (400, 404)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: Any = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it made."""
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._known.setdefault(given.untyped_storage(), 0)
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.live -= size


SimulatedExchange = Literal["ring", "two_way", "two_level", "node_gather", "all_gather"]


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
        visits: visits whose tiles are really computed, of a shard or of gathered ones; null
            computes all of them.
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


def measure_host_us(device: torch.device, num_visits: int = 64) -> float:
    """Microseconds that the host needs to launch one visit of the sigmoid loss on a device.

    Of visits so small that neither the device nor a transfer takes any time; the faster of two.

    Raises:
        UserError: if a process group runs already.
    """
    problem = Problem(local_batch_size=8, embed_dim=64, feature_bytes=4)
    inputs = _inputs(problem, device)
    taken = []
    for _ in range(3):
        with simulated_world(num_visits):
            started = time.perf_counter()
            siglip_loss(*inputs, exchange="ring", chunk_rows=8)
            taken.append(time.perf_counter() - started)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return 1e6 * min(taken[1:]) / num_visits


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
