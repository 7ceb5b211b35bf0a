"""Predicted cost of an exchange of the sigmoid loss on a given cluster.

Bytes, steps and memory follow from the schedule exactly. Time is a model: every rank computes at
one rate, no visit takes less than the host needs to launch it, a rank's transfers of a step share
its NVLink port or its network card (both full duplex, one card per rank), a batch of transfers
costs one latency, and batches run one after another beside the compute, as NCCL runs those of one
group; those that cross nodes run beside those inside. open_clip's exchanges are predicted for
comparison from what they send and keep.

The exchange "auto" asks this model, with the speeds of ``speeds``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from dist_siglip.distributed.ring_schedule import RingName, RingPath, ring_paths
from dist_siglip.distributed.speeds import Speeds
from dist_siglip.errors import UserError

PlanName = Literal[
    "ring", "two_way", "two_level", "node_gather", "all_gather", "open_clip bidir",
    "open_clip bidir chunked", "open_clip gather",
]  # fmt: skip

# Rows of a gradient that a backward pass scales and casts at a time.
GRADIENT_PIECE_ROWS = 1024
# float32 logits, values and derivative of one tile.
_TILE_BYTES_PER_PAIR = 12


@dataclass(frozen=True, kw_only=True)
class Cluster(Speeds):
    """The machines.

    Args:
        world_size: ranks, one GPU each.
        local_world_size: ranks per node; divides world_size.
        teraflops: see ``Speeds``, as the others.
        nvlink_gb_s: likewise.
        nic_gb_s: likewise.
        latency_us: likewise.
        host_us: likewise.
    """

    world_size: int
    local_world_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("world_size", "local_world_size"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} ({getattr(self, name)}) must be above 0")
        if self.world_size % self.local_world_size:
            raise UserError(
                f"local_world_size ({self.local_world_size}) must divide world_size "
                f"({self.world_size})"
            )

    @property
    def num_nodes(self) -> int:
        """Nodes of local_world_size ranks each."""
        return self.world_size // self.local_world_size


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The loss of one rank.

    Args:
        local_batch_size: pairs per rank, b.
        embed_dim: width of the features, d.
        feature_bytes: bytes of one feature number (2 for bf16), s.
        accumulator_bytes: bytes of one number of the travelling gradient (4 for float32); 0 if
            the travelling side needs none.
        chunk_rows: side of the largest tile, C.
    """

    local_batch_size: int
    embed_dim: int
    feature_bytes: int = 2
    accumulator_bytes: int = 4
    chunk_rows: int = 1024

    def __post_init__(self) -> None:
        for name in ("local_batch_size", "embed_dim", "feature_bytes", "chunk_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.accumulator_bytes < 0:
            raise UserError(f"accumulator_bytes ({self.accumulator_bytes}) must be at least 0")

    @property
    def shard_bytes(self) -> int:
        """One rank's features of one side, b d s."""
        return self.local_batch_size * self.embed_dim * self.feature_bytes

    @property
    def shard_accumulator_bytes(self) -> int:
        """The travelling gradient of one shard, b d s_g."""
        return self.local_batch_size * self.embed_dim * self.accumulator_bytes

    @property
    def visit_flops(self) -> int:
        """Three matmuls of b x b x d; two if nothing travels home."""
        matmuls = 3 if self.accumulator_bytes else 2
        return 2 * matmuls * self.local_batch_size**2 * self.embed_dim


class Prediction(NamedTuple):
    """Costs of one step of the loss on one rank.

    Attributes:
        exchange: its name.
        sent_bytes: bytes a rank sends, forward and backward.
        nic_bytes: bytes the busiest network card sends; 0 in one node.
        steps: batches of transfers, or collectives, one after another.
        compute_seconds: matmuls alone.
        exposed_seconds: time in which transfers, or the host, keep the device waiting.
        memory_bytes: peak memory of the loss beside its inputs.
    """

    exchange: PlanName
    sent_bytes: int
    nic_bytes: int
    steps: int
    compute_seconds: float
    exposed_seconds: float
    memory_bytes: int

    @property
    def seconds(self) -> float:
        """Compute and what transfers add to it."""
        return self.compute_seconds + self.exposed_seconds


def predict(exchange: PlanName, cluster: Cluster, problem: Problem) -> Prediction:
    """Predict one exchange.

    With b, d, s, C as in ``Problem``, s_g its accumulator_bytes, L paths of the schedule (2 for
    two_way, else 1), bytes per rank:

        sent     ring, two_way, two_level: (W - 1) b d s + W b d s_g; node_gather the same over
                 several nodes, in one node b d s_g less
                 all_gather: (W - 1) b d (s + s_g)
                 open_clip: 2 (W - 1) b d s
        memory   ring, two_way: L (2 b d s + 2 b d s_g) + b d s_g + 4 b d, and the larger of
                 (L - 1) b d s_g + 12 C^2 in the pass and 2 b d s in backward, beside
                 4 d min(b, 1024) for a cast
                 two_level: 4 b d s + 5 b d s_g + 4 b d + 12 C^2
                 node_gather, g ranks a node: (2 g + 2) b d s + (3 g + 1) b d s_g + 4 b d + 12 C^2
                 all_gather: W b d (s + s_g) + b d s_g + 4 b d + 12 C^2
                 open_clip bidir, gather: 8 W b^2 + W b d s; chunked: 4 W b^2 + W b d s

    Raises:
        UserError: if the exchange is unknown.

    Example:
        >>> cluster = Cluster(world_size=256, local_world_size=8)
        >>> problem = Problem(local_batch_size=4096, embed_dim=768)
        >>> [predict(name, cluster, problem).memory_bytes // 2**20 for name in
        ...  ("ring", "two_level", "open_clip bidir")]
        [75, 108, 34304]
    """
    if exchange in ("ring", "two_way"):
        return _ring(exchange, cluster, problem)
    if exchange in ("two_level", "node_gather"):
        return _through_nodes(exchange, cluster, problem)
    if exchange == "all_gather":
        return _gathering(cluster, problem)
    if exchange in get_args(PlanName):
        return _open_clip(exchange, cluster, problem)
    raise UserError(f"exchange ({exchange!r}) must be one of {', '.join(get_args(PlanName))}")


def _ring(exchange: RingName, cluster: Cluster, problem: Problem) -> Prediction:
    paths = _paths_of_a_node(exchange, cluster)
    steps = max(len(path.hops) for path in paths[0])
    visit_seconds = _visit_seconds(cluster, problem)
    nic_bytes = [0] * cluster.local_world_size
    free = now = accumulators_done = 0.0  # of the transfers, of the compute, of the last batch
    for step in range(steps):
        shards = _moves(paths, step, problem.shard_bytes, lambda path, s: s + 1 < len(path.hops))
        free = shards_done = max(now, free) + _duration(shards, cluster, nic_bytes)
        visits = sum(path.first_visit <= step < len(path.hops) for path in paths[0])
        now = max(now + visits * visit_seconds, accumulators_done)
        sums = _moves(
            paths,
            step,
            problem.shard_accumulator_bytes,
            lambda path, s: path.first_visit <= s < len(path.hops),
        )
        free = accumulators_done = max(now, free) + _duration(sums, cluster, nic_bytes)
        now = max(now, shards_done)
    total = max(now, accumulators_done)
    rows, world_size = problem.local_batch_size * problem.embed_dim, cluster.world_size
    kept = 2 * problem.shard_bytes + 2 * problem.shard_accumulator_bytes
    many = world_size > 1
    return Prediction(
        exchange=exchange,
        sent_bytes=(world_size - 1) * problem.shard_bytes
        + many * world_size * problem.shard_accumulator_bytes,
        nic_bytes=max(nic_bytes),
        steps=steps - 1 + bool(many and problem.accumulator_bytes),
        compute_seconds=_compute_seconds(cluster, problem),
        exposed_seconds=total - _compute_seconds(cluster, problem),
        memory_bytes=(
            many * len(paths[0]) * kept
            + problem.shard_accumulator_bytes
            + 4 * rows
            + max(
                (len(paths[0]) - 1) * problem.shard_accumulator_bytes + _tile_bytes(problem),
                many * _backward_bytes(problem),
            )
        ),
    )


def _backward_bytes(problem: Problem) -> int:
    """Gradients of both features, scaled, and the piece of one that is cast."""
    is_cast = problem.feature_bytes < 4
    piece = 4 * problem.embed_dim * min(problem.local_batch_size, GRADIENT_PIECE_ROWS)
    return 2 * problem.shard_bytes + is_cast * piece


class _Line:
    """Transfers that run one after another, beside the compute."""

    def __init__(self, gb_s: float, latency_us: float) -> None:
        self.gb_s, self.latency_us, self.free = gb_s, latency_us, 0.0

    def send(self, now: float, size: int) -> float:
        """Post a batch; return when it is done."""
        if size:
            self.free = max(now, self.free) + size / self.gb_s / 1e9 + self.latency_us / 1e6
        return self.free if size else now


def _through_nodes(
    exchange: Literal["two_level", "node_gather"], cluster: Cluster, problem: Problem
) -> Prediction:
    nodes, size, world_size = cluster.num_nodes, cluster.local_world_size, cluster.world_size
    shard, sums = problem.shard_bytes, problem.shard_accumulator_bytes
    inside = _Line(cluster.nvlink_gb_s, cluster.latency_us)
    across = _Line(cluster.nic_gb_s if nodes > 1 else cluster.nvlink_gb_s, cluster.latency_us)
    gathers, many = exchange == "node_gather", world_size > 1
    if gathers:
        seconds = _node_gather_seconds(cluster, problem, inside, across)
    else:
        seconds = _two_level_seconds(cluster, problem, inside, across)
    ahead = 2 * (nodes > 1)
    shards = 2 * size + ahead if gathers else 2 + ahead
    accumulators = 3 * size + 1 if gathers else 5
    goes_home = many and (nodes > 1 or not gathers)
    return Prediction(
        exchange=exchange,
        sent_bytes=(world_size - 1) * shard + (nodes * (size - 1) + nodes * goes_home) * sums,
        nic_bytes=((nodes - 1) * shard + nodes * sums) * (nodes > 1),
        steps=many * (nodes * (1 + bool(sums)) if gathers else world_size - (not sums)),
        compute_seconds=_compute_seconds(cluster, problem),
        exposed_seconds=seconds - _compute_seconds(cluster, problem),
        memory_bytes=(
            many * (shards * shard + accumulators * sums)
            + (not many) * sums
            + 4 * problem.local_batch_size * problem.embed_dim
            + _tile_bytes(problem)
        ),
    )


def _two_level_seconds(cluster: Cluster, problem: Problem, inside: _Line, across: _Line) -> float:
    nodes, size = cluster.num_nodes, cluster.local_world_size
    visit_seconds = _visit_seconds(cluster, problem)
    now = summed = crossed = 0.0  # of the compute; sums of the hop before, of the stage before
    for stage in range(nodes):
        arrives = across.send(now, problem.shard_bytes * (stage + 1 < nodes))
        for hop in range(size):
            is_last = hop + 1 == size
            follows = inside.send(now, problem.shard_bytes * (not is_last))
            now = max(now + visit_seconds, summed)
            if is_last:
                now = max(now, crossed)
                crossed = across.send(
                    now, problem.shard_accumulator_bytes * (cluster.world_size > 1)
                )
            else:
                summed = inside.send(now, problem.shard_accumulator_bytes)
            now = max(now, follows)
        now = max(now, arrives)
    return max(now, crossed)


def _node_gather_seconds(cluster: Cluster, problem: Problem, inside: _Line, across: _Line) -> float:
    nodes, size = cluster.num_nodes, cluster.local_world_size
    shards = (size - 1) * problem.shard_bytes
    sums = (size - 1) * problem.shard_accumulator_bytes
    node_sums = problem.shard_accumulator_bytes * (nodes > 1)
    arrives = across.send(0.0, problem.shard_bytes * (nodes > 1))
    gathered = inside.send(0.0, shards)
    now = max(_visit_seconds(cluster, problem), gathered)
    summed = crossed = 0.0
    for stage in range(nodes):
        now = max(now, arrives)
        gathered = inside.send(now, shards * (stage + 1 < nodes))
        arrives = across.send(now, problem.shard_bytes * (stage + 2 < nodes))
        visits = min(2, size - 1) if stage == 0 else 1
        now += _visit_seconds(cluster, problem, size if stage else size - 1, visits)
        if stage:
            now = max(now, summed, crossed)
            crossed = across.send(now, node_sums)
        summed = inside.send(now, sums)
        now = max(now, gathered)
    now = max(now, summed, crossed)
    return max(now, across.send(now, node_sums))


def _visit_seconds(
    cluster: Cluster, problem: Problem, num_shards: int = 1, visits: int = 1
) -> float:
    """Seconds for the tiles of some shards, which no host launches faster than it can."""
    seconds = num_shards * problem.visit_flops / (cluster.teraflops * 1e12)
    return max(seconds, visits * cluster.host_us / 1e6)


def _compute_seconds(cluster: Cluster, problem: Problem) -> float:
    return cluster.world_size * problem.visit_flops / (cluster.teraflops * 1e12)


def _gathering(cluster: Cluster, problem: Problem) -> Prediction:
    world_size = cluster.world_size
    compute_seconds = _compute_seconds(cluster, problem)
    # The own shard, those before it, those after it.
    launch_seconds = min(3, world_size) * cluster.host_us / 1e6
    parts = (problem.shard_bytes, problem.shard_accumulator_bytes)
    rows = problem.local_batch_size * problem.embed_dim
    return Prediction(
        exchange="all_gather",
        sent_bytes=(world_size - 1) * sum(parts),
        nic_bytes=(cluster.num_nodes - 1) * sum(parts),
        steps=sum(map(bool, parts)) * (world_size > 1),
        compute_seconds=compute_seconds,
        exposed_seconds=sum(_collective_seconds(part, cluster) for part in parts)
        + max(0.0, launch_seconds - compute_seconds),
        memory_bytes=(world_size * sum(parts) + parts[1] + 4 * rows + _tile_bytes(problem)),
    )


def _open_clip(exchange: PlanName, cluster: Cluster, problem: Problem) -> Prediction:
    world_size, batch = cluster.world_size, problem.local_batch_size
    visits, steps, nic = world_size, 2, 2 * (cluster.num_nodes - 1) * problem.shard_bytes
    if exchange == "open_clip gather":
        visits += 1  # its own block is computed twice
        exposed = 2 * _collective_seconds(problem.shard_bytes, cluster)
    else:
        paths = _paths_of_a_node("two_way", cluster)
        nic_bytes = [0] * cluster.local_world_size
        durations = [
            _duration(moves, cluster, nic_bytes)
            for step in range(world_size // 2)
            for moves in [
                _moves(paths, step, problem.shard_bytes, lambda path, s: s + 1 < len(path.hops))
            ]
        ]
        # Blocking, and once more in backward.
        steps, exposed, nic = 2 * len(durations), 2 * sum(durations), 2 * max(nic_bytes)
    pair_bytes = 4 if exchange == "open_clip bidir chunked" else 8
    flops = 6 * batch**2 * problem.embed_dim
    return Prediction(
        exchange=exchange,
        sent_bytes=2 * (world_size - 1) * problem.shard_bytes,
        nic_bytes=nic,
        steps=steps * (world_size > 1),
        compute_seconds=visits * flops / (cluster.teraflops * 1e12),
        exposed_seconds=exposed,
        memory_bytes=world_size * (pair_bytes * batch**2 + problem.shard_bytes),
    )


def _paths_of_a_node(exchange: RingName, cluster: Cluster) -> list[tuple[RingPath, ...]]:
    """Lanes of the ranks of the first node; every other node does the same at the same step."""
    return [
        ring_paths(exchange, rank, cluster.world_size) for rank in range(cluster.local_world_size)
    ]


def _moves(
    paths: Sequence[tuple[RingPath, ...]],
    step: int,
    size: int,
    moves_at: Callable[[RingPath, int], bool],
) -> Iterator[tuple[int, int, int]]:
    """Yield (rank, destination, bytes) of one step."""
    for rank, paths_here in enumerate(paths):
        for path in paths_here:
            if size and moves_at(path, step) and path.hops[step].goes_to != rank:
                yield rank, path.hops[step].goes_to, size


def _duration(
    moves: Iterator[tuple[int, int, int]], cluster: Cluster, nic_bytes: list[int]
) -> float:
    """Seconds of a batch of transfers; adds to ``nic_bytes`` what each card sends."""
    inside = [0] * cluster.local_world_size
    outside = [0] * cluster.local_world_size
    for rank, destination, size in moves:
        (inside if destination < cluster.local_world_size else outside)[rank] += size
    for rank, size in enumerate(outside):
        nic_bytes[rank] += size
    if not any(inside) and not any(outside):
        return 0.0
    seconds = max(max(inside) / cluster.nvlink_gb_s, max(outside) / cluster.nic_gb_s) / 1e9
    return seconds + cluster.latency_us / 1e6


def _collective_seconds(size: int, cluster: Cluster) -> float:
    """All-gather or reduce-scatter of ``size`` bytes per rank, with every network card at work."""
    if not size or cluster.world_size == 1:
        return 0.0
    inside = (cluster.world_size - 1) * size / cluster.nvlink_gb_s * (cluster.local_world_size > 1)
    outside = (cluster.num_nodes - 1) * size / cluster.nic_gb_s
    return max(inside, outside) / 1e9 + cluster.latency_us / 1e6


def _tile_bytes(problem: Problem) -> int:
    return _TILE_BYTES_PER_PAIR * min(problem.chunk_rows, problem.local_batch_size) ** 2
