"""Schedule of the ring exchanges, as arithmetic on ranks without tensors.

A shard travels on one or two paths and visits each rank of a path once; its accumulator follows
one step behind, and after the last visit goes home by one direct send. The moves of a step are a
permutation of the ranks, so every send has its receive.

    ring       one path, r -> r + 1. W visits. The shard of rank 2 of four:  2 -> 3 -> 0 -> 1,
               its accumulator one hop further, home to 2.
    two_way    two paths, r -> r + 1 and r -> r - 1, for half the distance each: about W / 2
               steps, both directions of every link. For even W the first path goes one further.

Over several nodes one card of each carries everything (measured for instance in
https://github.com/mlfoundations/open_clip/issues/971): see ``node_ring``.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from dist_siglip.errors import UserError

RingName = Literal["ring", "two_way"]


class Hop(NamedTuple):
    """One visit of a shard to one rank.

    Attributes:
        owner: rank whose shard is here now.
        came_from: rank where the shard (and its accumulator) was one step ago; this rank at
            the first step.
        goes_to: rank where both go next; after the last visit the owner, who gets the
            accumulator alone.
    """

    owner: int
    came_from: int
    goes_to: int


class RingPath(NamedTuple):
    """The shards that pass one rank on one path, step by step.

    Attributes:
        hops: one per step; the first is the rank's own shard.
        visits_own: whether the own shard is visited on this path (it is on one of them).
        home_from: rank that sends the own accumulator home after the last visit.
    """

    hops: tuple[Hop, ...]
    visits_own: bool
    home_from: int

    @property
    def first_visit(self) -> int:
        """Step of the first visit: 0, or 1 where the own shard is visited on another path."""
        return 0 if self.visits_own else 1


class _Route(NamedTuple):
    """The way of all shards on one path; ``place`` and ``owner`` are inverse at every step."""

    num_hops: int
    place: Callable[[int, int], int]  # (owner, step) -> rank
    owner: Callable[[int, int], int]  # (rank, step) -> owner


@lru_cache(maxsize=64)
def ring_paths(exchange: RingName, rank: int, world_size: int) -> tuple[RingPath, ...]:
    """List the hops that pass ``rank``; a pure function of its arguments.

    Args:
        exchange: "ring" or "two_way".
        rank: 0 <= rank < world_size.
        world_size: number of ranks, W.

    Returns:
        One path, or two for "two_way" with W > 2; over all paths every owner is visited once.

    Raises:
        UserError: if the name is unknown.

    Example:
        >>> (path,) = ring_paths("ring", rank=0, world_size=3)
        >>> [hop.owner for hop in path.hops]
        [0, 2, 1]
        >>> [[hop.owner for hop in path.hops] for path in ring_paths("two_way", 0, 4)]
        [[0, 3, 2], [0, 1]]
    """
    routes = _routes_of(exchange, world_size)
    return tuple(_path_of(route, rank, visits_own=index == 0) for index, route in enumerate(routes))


def _routes_of(exchange: RingName, world_size: int) -> list[_Route]:
    if exchange == "ring":
        return [_circle(world_size, world_size, 1)]
    if exchange == "two_way":
        there, back = world_size // 2, (world_size - 1) // 2
        routes = [_circle(world_size, there + 1, 1)]
        return routes + [_circle(world_size, back + 1, -1)] * (back > 0)
    raise UserError(f"exchange ({exchange!r}) must be one of {', '.join(get_args(RingName))}")


def _circle(world_size: int, num_hops: int, direction: int) -> _Route:
    return _Route(
        num_hops,
        lambda owner, step: (owner + direction * step) % world_size,
        lambda rank, step: (rank - direction * step) % world_size,
    )


def _path_of(route: _Route, rank: int, *, visits_own: bool) -> RingPath:
    last = route.num_hops - 1
    hops = []
    for step in range(route.num_hops):
        owner = route.owner(rank, step)
        came_from = route.place(owner, step - 1) if step else rank
        goes_to = route.place(owner, step + 1) if step < last else owner
        hops.append(Hop(owner, came_from, goes_to))
    return RingPath(tuple(hops), visits_own, home_from=route.place(rank, last))
