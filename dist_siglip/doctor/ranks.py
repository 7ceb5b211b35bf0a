"""Test of the ranks together: whether they connect, how fast, and whether they are alike."""

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from dist_siglip.distributed import World, leave_process_groups
from dist_siglip.distributed.speeds import remember
from dist_siglip.distributed.store_channel import StoreChannel
from dist_siglip.doctor.links import (
    ClockReading,
    ExchangeSpeed,
    TimedExchange,
    link_seconds,
    measure_exchange,
    measure_neighbours,
    measure_sum,
    read_clocks,
)
from dist_siglip.doctor.page import Finding
from dist_siglip.health.start_check import describe_differences, list_ranks

_MOST_NODES = 8  # shown by name
_MOST_GATHERED_BYTES = 2**30
_MEANT_SKEW_SECONDS = 2.0
_WORST_SKEW_SECONDS = 300.0
_SLOW_LINK = 3.0  # times the median of its kind, and by more than chance
_CHANCE_SECONDS = 5e-4


class GroupFacts(NamedTuple):
    """What ranks found out together.

    Attributes:
        backend: "nccl" or "gloo".
        sum_seconds: of an all-reduce of one number.
        sum_is_right: whether its result was.
        speeds: of the exchanges, slowest rank not singled out: they end together.
        neighbour_seconds: of this rank, sending to the next one.
        clocks: on the first rank.
    """

    backend: str
    sum_seconds: float
    sum_is_right: bool
    speeds: list[ExchangeSpeed]
    neighbour_seconds: float
    clocks: list[ClockReading]


def measure_group(
    channel: StoreChannel,
    world: World,
    *,
    backend: str,
    local_world_size: int,
    num_rows: int,
    embed_dim: int,
    limit: timedelta,
) -> GroupFacts:
    """Join a process group, as training does, and measure; every rank calls it.

    Args:
        channel: of all ranks.
        world: this rank.
        backend: "nccl", where every rank has a GPU of its own, or "gloo".
        local_world_size: ranks of each node; 1 if it is not one number.
        num_rows: rows of features a rank sends.
        embed_dim: numbers of a row.
        limit: longest wait for another rank.

    Raises:
        RuntimeError: within the time limit, if a rank does not take part.
    """
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        # A transfer that fails must raise here, not end the process.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    dist.init_process_group(
        backend,
        store=PrefixStore("group", channel.store),
        rank=world.rank,
        world_size=world.world_size,
        timeout=limit,
    )
    try:
        group = dist.group.WORLD
        assert group is not None  # just made
        on_cpu = dist.new_group(backend="gloo", timeout=limit)
        assert isinstance(on_cpu, ProcessGroup)  # every rank is in it
        sum_seconds, sum_is_right = measure_sum(device, group)
        names = exchanges_to_time(world.world_size, local_world_size, num_rows * embed_dim * 4)
        speeds = [
            measure_exchange(
                name,
                num_rows=num_rows,
                embed_dim=embed_dim,
                local_world_size=local_world_size,
                device=device,
                group=group,
            )
            for name in names
        ]
        neighbour_seconds = measure_neighbours(num_rows * embed_dim * 4, device, group)
        clocks = read_clocks(on_cpu)
    finally:
        leave_process_groups()
    return GroupFacts(backend, sum_seconds, sum_is_right, speeds, neighbour_seconds, clocks)


def exchanges_to_time(
    world_size: int, local_world_size: int, shard_bytes: int
) -> list[TimedExchange]:
    """Name the exchanges that differ on this many ranks, and fit into memory.

    Example:
        >>> exchanges_to_time(2, 2, 2**20), exchanges_to_time(8, 4, 2**20)
        (['ring', 'all_gather'], ['ring', 'two_way', 'two_level', 'node_gather', 'all_gather'])
    """
    names: list[TimedExchange] = ["ring"]
    if world_size > 2:
        names.append("two_way")
    if 1 < local_world_size < world_size:
        names += ["two_level", "node_gather"]
    if 2 * world_size * shard_bytes <= _MOST_GATHERED_BYTES:
        names.append("all_gather")
    return names


def look_at_layout(hosts: Sequence[str]) -> tuple[list[Finding], int]:
    """Judge how ranks lie on nodes.

    Args:
        hosts: of the ranks, in rank order.

    Returns:
        Findings, and the ranks of each node; 1 if it is not one number.

    Example:
        >>> findings, size = look_at_layout(["a", "a", "b", "b"])
        >>> findings[0].text, size
        ('4 ranks on 2 nodes: a (rank 0-1), b (rank 2-3)', 2)
        >>> look_at_layout(["a", "b", "a", "b"])[0][0].status
        'warn'
    """
    names = list(dict.fromkeys(hosts))
    ranks_of = {name: [r for r, host in enumerate(hosts) if host == name] for name in names}
    listed = [f"{name} (rank {list_ranks(ranks)})" for name, ranks in ranks_of.items()]
    if len(listed) > _MOST_NODES:
        listed[_MOST_NODES - 1 : -1] = ["..."]
    shown = ", ".join(listed)
    text = f"{len(hosts)} ranks on {len(names)} node{'s' * (len(names) > 1)}: {shown}"
    sizes = {len(ranks) for ranks in ranks_of.values()}
    places = [names.index(host) for host in hosts]
    if len(sizes) > 1 or places != sorted(places):
        remedy = (
            "start the same number of tasks on every node, numbered node by node (srun "
            "--distribution=block); exchanges two_level and node_gather need it"
        )
        return [Finding("warn", "ranks", text, remedy)], 1
    return [Finding("ok", "ranks", text)], sizes.pop()


def judge_group(
    everyone: Sequence[GroupFacts], hosts: Sequence[str], embed_bytes: int
) -> Iterator[Finding]:
    """Judge what the ranks measured together.

    Args:
        everyone: in rank order.
        hosts: of the ranks.
        embed_bytes: features each rank sent.
    """
    first = everyone[0]
    text = (
        f"{first.backend}, {len(hosts)} ranks; an all-reduce of one number takes "
        f"{1e6 * first.sum_seconds:,.0f} us"
    )
    wrong = [rank for rank, facts in enumerate(everyone) if not facts.sum_is_right]
    yield _judge_sums("group", text, wrong)
    for number, speed in enumerate(first.speeds):
        wrong = [rank for rank, facts in enumerate(everyone) if not facts.speeds[number].is_right]
        slowest = max(facts.speeds[number].seconds for facts in everyone)
        speed = speed._replace(seconds=slowest)
        text = (
            f"{speed.bytes_per_second / 1e9:.2f} GB/s sent by each rank, "
            f"{1e3 * speed.seconds:,.1f} ms for {embed_bytes / 2**20:.3g} MiB of features a rank, "
            f"{1e3 * speed.latency_seconds:,.2f} ms for one row"
        )
        yield _judge_sums(speed.exchange, text, wrong)
    neighbour_seconds = [facts.neighbour_seconds for facts in everyone]
    yield judge_links(neighbour_seconds, hosts, embed_bytes)
    speeds = link_speeds(everyone, hosts, embed_bytes)
    kept = remember("cuda" if first.backend == "nccl" else "cpu", **speeds)
    if kept is not None:
        told = ", ".join(f"{name} {value:.3g}" for name, value in speeds.items())
        yield Finding("ok", "speeds", f"exchange auto reckons with {told}: {kept}")
    yield judge_clocks(first.clocks, hosts)


def link_speeds(
    everyone: Sequence[GroupFacts], hosts: Sequence[str], num_bytes: int
) -> dict[str, float]:
    """Return what the cost model wants to know of links: usual ones of a kind, and a small batch.

    Args:
        everyone: in rank order.
        hosts: of the ranks.
        num_bytes: that went to the next rank.
    """
    links = link_seconds([facts.neighbour_seconds for facts in everyone])
    found = {}
    for name, is_inside in (("nvlink_gb_s", True), ("nic_gb_s", False)):
        seconds = [
            taken
            for taken, host, target in zip(links, hosts, [*hosts[1:], *hosts[:1]], strict=True)
            if (host == target) == is_inside
        ]
        if seconds:
            found[name] = num_bytes / median(seconds) / 1e9
    # Of one row: W - 1 times shards, and W times sums, go on.
    ring = next(speed for speed in everyone[0].speeds if speed.exchange == "ring")
    found["latency_us"] = 1e6 * ring.latency_seconds / len(hosts)
    return found


def _judge_sums(check: str, text: str, wrong: Sequence[int]) -> Finding:
    if not wrong:
        return Finding("ok", check, text)
    return Finding(
        "FAIL",
        check,
        f"{text}; the sums of rank {list_ranks(wrong)} are wrong",
        "take these nodes out of service; network or memory changes data",
    )


def judge_links(seconds: Sequence[float], hosts: Sequence[str], num_bytes: int) -> Finding:
    """Find a link from a rank to the next one that is slower than others of its kind.

    Args:
        seconds: of ``measure_neighbours`` on every rank.
        hosts: of the ranks; links inside a node and between nodes are two kinds.
        num_bytes: that were sent.

    Example:
        >>> finding = judge_links([9.0, 9.0, 1.0, 1.0, 1.0], ["a"] * 5, 10**9)
        >>> finding.status, finding.text
        ('warn', 'rank 0 (a) to rank 1 (a): 0.11 GB/s, others inside a node 1.00 GB/s')
    """
    links = link_seconds(seconds)
    following = [*range(1, len(links)), 0]
    kinds: dict[str, list[int]] = {"inside a node": [], "between nodes": []}
    for rank, target in enumerate(following):
        kind = "inside a node" if hosts[rank] == hosts[target] else "between nodes"
        kinds[kind].append(rank)
    told = []
    for kind, ranks in kinds.items():
        if not ranks:
            continue
        usual = median(links[rank] for rank in ranks)
        slow = max(ranks, key=lambda rank: links[rank])
        speed = f"{num_bytes / usual / 1e9:.2f} GB/s"
        if links[slow] > max(_SLOW_LINK * usual, usual + _CHANCE_SECONDS):
            target = following[slow]
            return Finding(
                "warn",
                "links",
                f"rank {slow} ({hosts[slow]}) to rank {target} ({hosts[target]}): "
                f"{num_bytes / links[slow] / 1e9:.2f} GB/s, others {kind} {speed}",
                "every exchange waits for its slowest link: leave this node out (--exclude)",
            )
        told.append(f"{speed} {kind}")
    return Finding("ok", "links", f"to the next rank, all at once: {', '.join(told)}")


def judge_clocks(clocks: Sequence[ClockReading], hosts: Sequence[str]) -> Finding:
    """Judge the clock that differs most from the first rank's.

    Example:
        >>> judge_clocks([ClockReading(0, 0), ClockReading(-400, 0.01)], ["a", "b"]).text
        'rank 1 (b) is 400.000 s behind rank 0 (a), known to 10.0 ms'
    """
    rank = max(range(len(clocks)), key=lambda r: abs(clocks[r].ahead_seconds))
    ahead, uncertainty = clocks[rank]
    way = "ahead of" if ahead > 0 else "behind"
    text = (
        f"rank {rank} ({hosts[rank]}) is {abs(ahead):.3f} s {way} rank 0 ({hosts[0]}), known to "
        f"{1e3 * uncertainty:.1f} ms"
    )
    apart = abs(ahead) - uncertainty
    if apart > _WORST_SKEW_SECONDS:
        return Finding(
            "FAIL", "clocks", text, "start chronyd or ntpd there; object stores refuse such clocks"
        )
    if apart > _MEANT_SKEW_SECONDS:
        return Finding("warn", "clocks", text, "start chronyd or ntpd there: logs will not line up")
    return Finding("ok", "clocks", text)


def compare_ranks(facts: Sequence[Mapping[str, str] | None]) -> list[Finding]:
    """Judge what differs between ranks and should not."""
    differences = describe_differences(facts)
    if not differences:
        return [
            Finding("ok", "alike", f"{len(facts)} ranks have the same versions, code and settings")
        ]
    remedy = "give all nodes the same environment and the same shards"
    return [Finding("FAIL", "alike", difference, remedy) for difference in differences[:4]]


def unpack_group(value: Any) -> GroupFacts:
    """Make facts of what went through JSON."""
    backend, sum_seconds, sum_is_right, speeds, neighbour_seconds, clocks = value
    return GroupFacts(
        backend,
        sum_seconds,
        sum_is_right,
        [ExchangeSpeed(*speed) for speed in speeds],
        neighbour_seconds,
        [ClockReading(*clock) for clock in clocks],
    )
