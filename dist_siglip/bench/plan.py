"""``bench plan``: what each exchange of the loss costs on a cluster that need not be at hand."""

import json as json_text
import sys
from typing import Any, cast, get_args

from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Store

from dist_siglip.distributed.cost_model import Cluster, PlanName, Prediction, Problem, predict
from dist_siglip.distributed.handshake import GroupLink, Handshake
from dist_siglip.distributed.speeds import Speeds
from dist_siglip.distributed.store_channel import StoreChannel
from dist_siglip.errors import UserError

# The default group's, and clones of it: for the comparison at the start, and two of the watchdog.
_STORE_CONNECTIONS = 4


def plan(
    world_size: int = 256,
    local_world_size: int = 8,
    local_batch_size: int = 4096,
    embed_dim: int = 768,
    feature_bytes: int = 2,
    accumulator_bytes: int = 4,
    chunk_rows: int = 1024,
    teraflops: float = 400.0,
    nvlink_gb_s: float = 300.0,
    nic_gb_s: float = 50.0,
    latency_us: float = 15.0,
    host_us: float = 150.0,
    num_shards: int = 10_000,
    json: bool = False,
) -> int:
    """Print predicted costs of every exchange, and open_clip's; and what agreeing costs a rank.

    Args:
        world_size: GPUs.
        local_world_size: GPUs per node; divides world_size.
        local_batch_size: pairs per GPU.
        embed_dim: width of the features.
        feature_bytes: bytes of one feature number, 2 for bf16.
        accumulator_bytes: bytes of one number of the travelling gradient, 4 for float32; 0 if
            the travelling side is frozen.
        chunk_rows: side of the largest tile of logits.
        teraflops: TFLOP/s that one GPU reaches in matmuls.
        nvlink_gb_s: GB/s one GPU sends inside the node.
        nic_gb_s: GB/s one network card sends; one card per GPU.
        latency_us: microseconds a batch of transfers costs beyond its bytes.
        host_us: microseconds the host needs to launch one visit.
        num_shards: local shards of the training data.
        json: print JSON instead of a table.
    """
    cluster = Cluster(
        world_size=world_size,
        local_world_size=local_world_size,
        teraflops=teraflops,
        nvlink_gb_s=nvlink_gb_s,
        nic_gb_s=nic_gb_s,
        latency_us=latency_us,
        host_us=host_us,
    )
    problem = Problem(
        local_batch_size=local_batch_size,
        embed_dim=embed_dim,
        feature_bytes=feature_bytes,
        accumulator_bytes=accumulator_bytes,
        chunk_rows=chunk_rows,
    )
    predictions = [predict(name, cluster, problem) for name in get_args(PlanName)]
    control = control_plane(cluster, num_shards)
    if json:
        rows = [*plan_rows(predictions), {"exchange": "control plane", **control}]
        sys.stdout.write(json_text.dumps(rows, indent=2) + "\n")
        return 0
    console = Console()
    console.print(_table(cluster, problem, predictions))
    console.print(_control_table(cluster, num_shards, control))
    return 0


class _Counted:
    """A group, and a store, of so many ranks that say what this one says; counts messages."""

    def __init__(self, world_size: int, missing: str = "") -> None:
        self.world_size, self.missing = world_size, missing
        self.peers: set[int] = set()
        self.messages = self.num_bytes = self.requests = 0

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self.world_size

    def send(self, tensors: list[Tensor], target: int, tag: int) -> "_Counted":
        self.peers.add(target)
        self.messages += 1
        self.num_bytes += tensors[0].nbytes
        self._last = tensors[0].clone()
        return self

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> "_Counted":
        self.peers.add(source)
        tensors[0].copy_(self._last)
        return self

    def wait(self, *_: object) -> None:
        self.requests += bool(_)

    def announce(self, message: bytes) -> list[bytes]:
        """A ring, as gloo gathers: with two neighbours, everybody's message once."""
        self.peers |= {1, self.world_size - 1}
        self.messages += self.world_size - 1
        self.num_bytes += (self.world_size - 1) * len(message)
        return [message] * self.world_size

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        return self.missing not in keys

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests += 1
        return [b"0"] * len(keys)


def control_plane(cluster: Cluster, num_shards: int) -> dict[str, int]:
    """Count what a rank does to agree with the others, by running it with ranks that do not exist.

    Args:
        cluster: the machines.
        num_shards: local shards.

    Returns:
        By name: of a handshake in a steady run, and of the first one, messages and bytes sent; of
        the control group and of the store, connections; requests to the store to find one rank that
        is missing; metadata calls for the shards, at least, and files of their table opened.
    """
    world_size = cluster.world_size
    if num_shards < 1:
        raise UserError(f"num_shards ({num_shards}) must be at least 1")
    counted = _Counted(world_size)
    link = GroupLink(cast(ProcessGroup, counted))
    handshake = Handshake(link.maximum, counted.announce)

    def agree() -> tuple[int, int]:
        counted.messages = counted.num_bytes = 0
        handshake.agree(1, cluster.local_world_size, "float32 (*, 1)", {}, Speeds())
        return counted.messages, counted.num_bytes

    first, steady = agree(), agree()
    store = _Counted(world_size, missing=f"failed/{world_size // 3}")
    StoreChannel(cast(Store, store), 0, world_size).gather("failed", 0.0)
    return {
        "steady_messages": steady[0],
        "steady_bytes": steady[1],
        "first_messages": first[0],
        "first_bytes": first[1],
        "group_connections": len(counted.peers - {0}),
        "store_connections": _STORE_CONNECTIONS,
        "requests_to_name_a_missing_rank": store.requests,
        # Is it there, where is it really, its size and time; on the first rank of a node.
        "metadata_calls_of_a_node": 3 * num_shards,
        "table_files": 2,
    }


def _control_table(cluster: Cluster, num_shards: int, control: dict[str, int]) -> Table:
    table = Table(
        title=f"what a rank of {cluster.world_size:,} does to agree, counted in a simulation",
        caption=(
            f"beside NCCL's own connections; {num_shards:,} local shards, whose metadata the first "
            "rank of a node asks for; one rank of all is missing"
        ),
    )
    table.add_column("of a rank")
    table.add_column("count", justify="right")
    for name, value in control.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    return table


def plan_rows(predictions: list[Prediction]) -> list[dict[str, Any]]:
    """Return the predictions as plain values, ``gain`` being the ring's time over their own."""
    ring_seconds = next(p.seconds for p in predictions if p.exchange == "ring")
    return [
        {
            "exchange": prediction.exchange,
            "sent_bytes": prediction.sent_bytes,
            "nic_bytes": prediction.nic_bytes,
            "steps": prediction.steps,
            "compute_seconds": prediction.compute_seconds,
            "exposed_seconds": prediction.exposed_seconds,
            "seconds": prediction.seconds,
            "gain": ring_seconds / prediction.seconds,
            "memory_bytes": prediction.memory_bytes,
        }
        for prediction in predictions
    ]


def _table(cluster: Cluster, problem: Problem, predictions: list[Prediction]) -> Table:
    table = Table(
        title=(
            f"one step of the sigmoid loss, predicted: {cluster.num_nodes} nodes of "
            f"{cluster.local_world_size} GPUs, {problem.local_batch_size} pairs each, "
            f"{problem.embed_dim} wide"
        ),
        caption=(
            f"per GPU; {cluster.teraflops:g} TFLOP/s, NVLink {cluster.nvlink_gb_s:g} GB/s, "
            f"network card {cluster.nic_gb_s:g} GB/s, {cluster.latency_us:g} us per batch of "
            f"transfers, {cluster.host_us:g} us of the host per visit; waiting: time that "
            "transfers and the host add to the compute; gain: the ring's time "
            "over this one; memory: the loss beside its inputs"
        ),
    )
    table.add_column("exchange")
    headings = ("sent", "busiest card", "steps", "compute", "waiting", "total", "gain", "memory")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in plan_rows(predictions):
        table.add_row(
            row["exchange"],
            mebibytes(row["sent_bytes"]),
            mebibytes(row["nic_bytes"]),
            f"{row['steps']:,}",
            *(_milliseconds(row[f"{part}seconds"]) for part in ("compute_", "exposed_", "")),
            f"{row['gain']:.2f}",
            mebibytes(row["memory_bytes"]),
        )
    return table


def mebibytes(size: float) -> str:
    """Write a number of bytes in MiB.

    Example:
        >>> mebibytes(34_304 * 2**20), mebibytes(2**19)
        ('34,304 MiB', '0.5 MiB')
    """
    number = size / 2**20
    return f"{number:,.0f} MiB" if number >= 10 or number == 0 else f"{number:.1f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"
