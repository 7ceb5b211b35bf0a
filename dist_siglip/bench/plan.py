"""``bench plan``: what each exchange of the loss costs on a cluster that need not be at hand."""

import json as json_text
import sys
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from dist_siglip.distributed.cost_model import Cluster, PlanName, Prediction, Problem, predict


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
    json: bool = False,
) -> int:
    """Print predicted bytes, steps, time and memory of every exchange, and open_clip's.

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
    if json:
        sys.stdout.write(json_text.dumps(plan_rows(predictions), indent=2) + "\n")
        return 0
    Console().print(_table(cluster, problem, predictions))
    return 0


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
