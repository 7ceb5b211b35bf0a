"""Speed and correctness of the exchanges between these ranks, and the skew of their clocks.

Every exchange runs as it does in training, with numbers whose result is known: once with one row,
which gives its latency, and with as many bytes as training sends, which gives the bandwidth.
Neighbours are timed by themselves, so that one slow link is found among many.

Clocks: the first rank asks every other one for its time, a few times; of the quickest answer the
true moment is known best, to half its way there and back.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed.cost_model import Cluster, Problem, predict
from dist_siglip.distributed.exchange import circulate
from dist_siglip.distributed.ring import AccumulatorSpec, Shard

TimedExchange = Literal["ring", "two_way", "two_level", "node_gather", "all_gather"]
_ROUNDS = 5
_QUESTIONS = 5


class ExchangeSpeed(NamedTuple):
    """Measured speed of one exchange.

    Attributes:
        exchange: its name.
        latency_seconds: of an exchange of one row a rank, median.
        seconds: of an exchange of all rows, median.
        sent_bytes: bytes a rank sends in it.
        is_right: whether every rank got the sums it should.
    """

    exchange: str
    latency_seconds: float
    seconds: float
    sent_bytes: int
    is_right: bool

    @property
    def bytes_per_second(self) -> float:
        """What each rank sends at once."""
        return self.sent_bytes / self.seconds


def measure_exchange(
    exchange: TimedExchange,
    *,
    num_rows: int,
    embed_dim: int,
    local_world_size: int,
    device: torch.device,
    group: ProcessGroup,
) -> ExchangeSpeed:
    """Time one exchange of float32 rows and their accumulators.

    Distributed contract: collective over ``group``; twelve exchanges.

    Args:
        exchange: "ring", "two_way", "two_level", "node_gather" or "all_gather".
        num_rows: rows of each rank.
        embed_dim: numbers of a row.
        local_world_size: ranks of each node; divides the ranks of the group.
        device: where the rows are.
        group: at least two ranks.

    Raises:
        RuntimeError: within the time limit of the group, if a rank does not take part.
    """

    def measure(rows: int) -> tuple[float, bool]:
        mine = torch.full((rows, embed_dim), group.rank() + 1.0, device=device)
        got: list[Tensor] = []

        def run() -> None:
            got[:] = exchange_and_sum(mine, exchange, local_world_size, group)

        seconds = _median_seconds(run, device, group)
        return seconds, bool((got[0] == expected_sum(group.rank(), group.size())).all())

    latency, short_is_right = measure(1)
    seconds, long_is_right = measure(num_rows)
    cluster = Cluster(world_size=group.size(), local_world_size=local_world_size)
    problem = Problem(local_batch_size=num_rows, embed_dim=embed_dim, feature_bytes=4)
    sent = predict(exchange, cluster, problem).sent_bytes
    return ExchangeSpeed(exchange, latency, seconds, sent, short_is_right and long_is_right)


def exchange_and_sum(
    rows: Tensor, exchange: TimedExchange, local_world_size: int, group: ProcessGroup
) -> Shard:
    """Let every rank add its number, times the rows, to the rows of all; return the own sums."""
    number = group.rank() + 1.0

    def visit(owner: int, shard: Shard, contributions: Shard) -> None:
        torch.mul(shard[0], number, out=contributions[0])

    spec = AccumulatorSpec((rows.shape[1],), rows.dtype)
    return circulate(
        [rows],
        visit,
        accumulators=[spec],
        exchange=exchange,
        group=group,
        local_world_size=local_world_size,
    )


def expected_sum(rank: int, world_size: int) -> float:
    """Return what ``exchange_and_sum`` makes of a row of ``rank + 1``.

    Example:
        >>> expected_sum(1, 3)
        12.0
    """
    return (rank + 1.0) * world_size * (world_size + 1) / 2


def measure_sum(device: torch.device, group: ProcessGroup) -> tuple[float, bool]:
    """Time an all-reduce of one number; return its seconds and whether the sum is right.

    Distributed contract: collective over ``group``; six all-reduces.
    """
    number = torch.zeros(1, device=device)

    def run() -> None:
        number.fill_(group.rank() + 1.0)
        dist.all_reduce(number, group=group)

    seconds = _median_seconds(run, device, group)
    return seconds, number.item() == group.size() * (group.size() + 1) / 2


def measure_neighbours(num_bytes: int, device: torch.device, group: ProcessGroup) -> float:
    """Send to the next rank while receiving from the one before; return this rank's seconds.

    Distributed contract: collective over ``group``; six transfers to the next rank.
    """
    rank, world_size = group.rank(), group.size()
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)

    def run() -> None:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % world_size),
                dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % world_size),
            ]
        )
        for work in works:
            work.wait()

    return _median_seconds(run, device, group)


def link_seconds(rank_seconds: Sequence[float]) -> list[float]:
    """Return the seconds of the link from each rank to the next: of its faster end.

    Both ends of a slow link are slow; a fast link beside it shares only one end with it.

    Args:
        rank_seconds: of ``measure_neighbours`` on every rank.

    Example:
        >>> link_seconds([9.0, 9.0, 1.0, 1.0])  # rank 0 sends slowly to rank 1
        [9.0, 1.0, 1.0, 1.0]
    """
    following = [*rank_seconds[1:], *rank_seconds[:1]]
    return [min(pair) for pair in zip(rank_seconds, following, strict=True)]


def _median_seconds(run: Callable[[], None], device: torch.device, group: ProcessGroup) -> float:
    """Time a call, after one that is not counted; all ranks begin together."""
    taken = []
    for _ in range(_ROUNDS + 1):
        dist.barrier(group=group)
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ClockReading(NamedTuple):
    """The clock of one rank beside that of the first.

    Attributes:
        ahead_seconds: of the first rank's clock.
        uncertainty_seconds: half the time of the question and its answer.
    """

    ahead_seconds: float
    uncertainty_seconds: float


def read_clocks(group: ProcessGroup) -> list[ClockReading]:
    """Compare the clocks of all ranks with that of the first.

    Distributed contract: collective over ``group``, which must be on the CPU; a few bytes five
    times to every rank and back, one rank after the other.

    Returns:
        In rank order, on the first rank; nothing on the others.

    Raises:
        RuntimeError: within the time limit of the group, if a rank does not answer.
    """
    stamp = torch.zeros(1, dtype=torch.float64)
    if group.rank():
        for _ in range(_QUESTIONS):
            dist.recv(stamp, group=group, group_src=0)
            stamp[0] = time.time()
            dist.send(stamp, group=group, group_dst=0)
        return []
    readings = [ClockReading(0.0, 0.0)]
    for rank in range(1, group.size()):
        answers = []
        for _ in range(_QUESTIONS):
            asked = time.time()
            dist.send(stamp, group=group, group_dst=rank)
            dist.recv(stamp, group=group, group_src=rank)
            half = (time.time() - asked) / 2
            answers.append(ClockReading(float(stamp) - asked - half, half))
        readings.append(min(answers, key=lambda answer: answer.uncertainty_seconds))
    return readings
