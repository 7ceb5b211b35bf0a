"""Which rank holds which shard at which step: arithmetic on ranks, without tensors.

A shard travels on one or two lanes. On a lane it stops once at every rank it visits; the
accumulator of the shard rides along one step behind, and after the last stop goes home by one
direct send. Every rank moves at the same step and the step's moves are a permutation of the
ranks, so every send has its receive.

    ring       one lane, r -> r + 1. W stops. The shard of rank 2 of four:  2 -> 3 -> 0 -> 1,
               its accumulator one hop further, home to 2.
    two_way    two lanes, r -> r + 1 and r -> r - 1, for half the distance each: about W / 2
               steps, both directions of every link. For even W the first lane goes one further.
    two_level  one lane through nodes of g ranks each: a ring inside the node, then one hop to the
               same local index of the next node, again a ring inside that node, ... All ranks of
               a node cross to the next one at the same step, each by its own NIC. W stops.

Source: the cost of a flat ring over nodes (one NIC of a node carries everything) is measured for
instance in https://github.com/mlfoundations/open_clip/issues/971.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from dist_siglip.errors import UserError

TravelName = Literal["ring", "two_way", "two_level"]


class Stop(NamedTuple):
    """One visit of a shard to one rank.

    Attributes:
        owner: rank whose shard is here now.
        came_from: rank where the shard (and its accumulator) was one step ago; this rank at
            the first stop.
        goes_to: rank where both go next; after the last stop the owner, who gets the
            accumulator alone.
    """

    owner: int
    came_from: int
    goes_to: int


class Lane(NamedTuple):
    """What passes one rank on one lane, step by step.

    Attributes:
        stops: one per step; the first is the rank's own shard.
        visits_own: whether the own shard is visited on this lane (it is on one of them).
        home_from: rank that sends the own accumulator home after the last stop.
    """

    stops: tuple[Stop, ...]
    visits_own: bool
    home_from: int

    @property
    def first_visit(self) -> int:
        """Step of the first visit: 0, or 1 where the own shard is visited on another lane."""
        return 0 if self.visits_own else 1


class _Path(NamedTuple):
    """The way of all shards on one lane; ``place`` and ``owner`` are inverse at every step."""

    num_stops: int
    place: Callable[[int, int], int]  # (owner, step) -> rank
    owner: Callable[[int, int], int]  # (rank, step) -> owner


@lru_cache(maxsize=64)
def lanes_of(
    exchange: TravelName, rank: int, world_size: int, local_world_size: int = 1
) -> tuple[Lane, ...]:
    """Return what passes ``rank`` and where it goes, a pure function of its arguments.

    Args:
        exchange: "ring", "two_way" or "two_level".
        rank: 0 <= rank < world_size.
        world_size: number of ranks, W.
        local_world_size: ranks per node, for "two_level"; must divide W; node k holds the ranks
            k * local_world_size to (k + 1) * local_world_size - 1.

    Returns:
        One lane, or two for "two_way" with W > 2; over all lanes every owner is visited once.

    Raises:
        UserError: if the name is unknown or local_world_size does not divide W.

    Example:
        >>> (lane,) = lanes_of("ring", rank=0, world_size=3)
        >>> [stop.owner for stop in lane.stops]
        [0, 2, 1]
        >>> [[stop.owner for stop in lane.stops] for lane in lanes_of("two_way", 0, 4)]
        [[0, 3, 2], [0, 1]]
        >>> (lane,) = lanes_of("two_level", rank=0, world_size=4, local_world_size=2)
        >>> [stop.owner for stop in lane.stops]
        [0, 1, 3, 2]
    """
    paths = _paths_of(exchange, world_size, local_world_size)
    return tuple(_lane_of(path, rank, visits_own=index == 0) for index, path in enumerate(paths))


def _paths_of(exchange: TravelName, world_size: int, local_world_size: int) -> list[_Path]:
    if exchange == "ring":
        return [_circle(world_size, world_size, 1)]
    if exchange == "two_way":
        there, back = world_size // 2, (world_size - 1) // 2
        paths = [_circle(world_size, there + 1, 1)]
        return paths + [_circle(world_size, back + 1, -1)] * (back > 0)
    if exchange == "two_level":
        if local_world_size < 1 or world_size % local_world_size:
            raise UserError(
                f"local_world_size ({local_world_size}) must divide the {world_size} ranks of the "
                "group for exchange 'two_level'; use 'ring' or 'auto' where nodes differ in size"
            )
        return [_through_nodes(world_size // local_world_size, local_world_size)]
    raise UserError(f"exchange ({exchange!r}) must be one of {', '.join(get_args(TravelName))}")


def _circle(world_size: int, num_stops: int, direction: int) -> _Path:
    return _Path(
        num_stops,
        lambda owner, step: (owner + direction * step) % world_size,
        lambda rank, step: (rank - direction * step) % world_size,
    )


def _through_nodes(num_nodes: int, size: int) -> _Path:
    def move(start: int, step: int, sign: int) -> int:
        # A ring inside a node has size - 1 hops, so each crossing costs one local index.
        crossings, hops = divmod(step, size)
        node, local = divmod(start, size)
        node = (node + sign * crossings) % num_nodes
        return node * size + (local + sign * (hops - crossings)) % size

    return _Path(
        num_nodes * size,
        lambda owner, step: move(owner, step, 1),
        lambda rank, step: move(rank, step, -1),
    )


def _lane_of(path: _Path, rank: int, *, visits_own: bool) -> Lane:
    last = path.num_stops - 1
    stops = []
    for step in range(path.num_stops):
        owner = path.owner(rank, step)
        came_from = path.place(owner, step - 1) if step else rank
        goes_to = path.place(owner, step + 1) if step < last else owner
        stops.append(Stop(owner, came_from, goes_to))
    return Lane(tuple(stops), visits_own, home_from=path.place(rank, last))
