"""When a rank gets nowhere or has failed, how do all learn of it, and who is to blame?

Ranks talk through the store that brought them together, never by a collective, which would hang
where the others hang. One rank asks; all write down where they stand; the one that asked reads it
and decides: the run ends, and why, or the others are only slow. A process that is stopped or gone
writes nothing.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from dist_siglip.health.start_check import list_ranks

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_MOST_TOLD = 3


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rank stands.

    Attributes:
        step: training step it is at, counted from 1.
        phase: part of the step, in words.
        order: of phases within a step; a smaller one comes first.
        doing: call it is in.
        waits: whether that call waits for other ranks.
        seconds: since it last got on.
        is_overdue: whether that is longer than the phase may take.
        error: what it failed with, if it did; empty for a call that failed for want of others.
        exit_code: with which all ranks are to end for that; 0 leaves it to each.
    """

    step: int = 0
    phase: str = "starting"
    order: int = 0
    doing: str = ""
    waits: bool = False
    seconds: float = 0.0
    is_overdue: bool = False
    error: str = ""
    exit_code: int = 0


class Verdict(NamedTuple):
    """Why the run ends.

    Attributes:
        line: in words.
        culprits: ranks to blame.
        num_answers: ranks that have answered, and so can read this.
        exit_code: with which all ranks are to end; 0 leaves it to each.
    """

    line: str
    culprits: list[int]
    num_answers: int
    exit_code: int = 0


class Alarm:
    """What ranks ask and tell each other, through a store, in numbered rounds.

    Args:
        store: a connection that serves nothing else: another thread may hold the usual one.
        rank: of this process.
        world_size: ranks that may answer.
    """

    def __init__(self, store: "Store", rank: int, world_size: int) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size

    def current_round(self) -> int:
        """Return the number of the round that is not yet decided."""
        return int(self.store.add("round", 0))

    def is_asked(self, number: int) -> bool:
        """Whether a rank has asked all where they stand."""
        return bool(self.store.check([f"{number}/asked"]))

    def answer(self, number: int, standing: Standing) -> None:
        """Write down where this rank stands."""
        self.store.set(f"{number}/rank-{self.rank}", json.dumps(asdict(standing)))

    def verdict(self) -> Verdict | None:
        """Return why the run ends, if it does."""
        if not self.store.check(["verdict"]):
            return None
        return Verdict(**json.loads(self.store.get("verdict")))

    def confer(self, standing: Standing, seconds: float, *, has_failed: bool) -> Verdict | None:
        """Ask all ranks where they stand, or answer the one that does; return what is decided.

        Takes at most four times ``seconds``.

        Args:
            standing: of this rank.
            seconds: to wait for answers.
            has_failed: whether this rank ends whatever the others say.

        Returns:
            None if the run goes on.
        """
        for _ in range(2):  # the rank that asks may be gone before it decides
            if (decided := self.verdict()) is not None:
                return decided
            number = self.current_round()
            self.answer(number, standing)
            if self.store.add(f"{number}/askers", 1) == 1:
                return self._ask(number, seconds, has_failed=has_failed)
            deadline = time.monotonic() + 1.5 * seconds
            while time.monotonic() < deadline:
                if self.current_round() > number:
                    return self.verdict()
                time.sleep(0.2)
            self.store.add("round", 1)
        return None

    def _ask(self, number: int, seconds: float, *, has_failed: bool) -> Verdict | None:
        self.store.set(f"{number}/asked", "")
        standings = self._collect(number, time.monotonic() + seconds)
        verdict = None
        if has_failed or must_end(standings, self.world_size):
            culprits = name_culprits(standings, self.world_size)
            line = tell(standings, self.world_size)
            code = max(standing.exit_code for standing in standings.values())
            verdict = Verdict(line, culprits, len(standings), code)
            self.store.set("verdict", json.dumps(verdict._asdict()))
        self.store.add("round", 1)
        return verdict

    def is_first_to_speak(self) -> bool:
        """Whether no other rank has asked this yet."""
        return int(self.store.add("speakers", 1)) == 1

    def leave(self, num_answers: int, seconds: float) -> None:
        """Note that this rank knows the verdict; the first, which may hold the store, waits.

        Args:
            num_answers: ranks that will note it.
            seconds: to wait for them at most.
        """
        if self.rank != 0:
            self.store.add("left", 1)
            return
        deadline = time.monotonic() + seconds
        while self.store.add("left", 0) < num_answers - 1 and time.monotonic() < deadline:
            time.sleep(0.05)

    def _collect(self, number: int, deadline: float) -> dict[int, Standing]:
        found: dict[int, Standing] = {}
        while True:
            for rank in range(self.world_size):
                if rank not in found and self.store.check([key := f"{number}/rank-{rank}"]):
                    found[rank] = Standing(**json.loads(self.store.get(key)))
            if len(found) == self.world_size or time.monotonic() > deadline:
                return found
            time.sleep(0.05)


def must_end(standings: Mapping[int, Standing], world_size: int) -> bool:
    """Whether a run gets nowhere, or only waits for a rank that takes its time.

    Example:
        >>> waiting = Standing(step=3, waits=True, is_overdue=True)
        >>> must_end({0: waiting, 1: Standing(step=2, phase="evaluation")}, 2)
        False
        >>> must_end({0: waiting, 1: Standing(step=2, is_overdue=True)}, 2)
        True
        >>> must_end({0: waiting}, 2)
        True
    """
    culprits = name_culprits(standings, world_size)
    found = [standings.get(rank) for rank in culprits]
    return not found or any(s is None or s.error or s.is_overdue for s in found)


def name_culprits(standings: Mapping[int, Standing], world_size: int) -> list[int]:
    """Return the ranks that keep the others waiting; empty if it cannot be told.

    Those that failed; else those that do not answer; else, of the ranks that do not wait for
    others, the ones furthest behind.

    Example:
        >>> name_culprits({0: Standing(step=2, waits=True), 1: Standing(step=2)}, 2)
        [1]
        >>> name_culprits({0: Standing(step=2, waits=True)}, 2)
        [1]
    """
    failed = [rank for rank, standing in sorted(standings.items()) if standing.error]
    if failed:
        return failed
    silent = [rank for rank in range(world_size) if rank not in standings]
    if silent:
        return silent
    busy = {rank: (s.step, s.order) for rank, s in sorted(standings.items()) if not s.waits}
    return [rank for rank, place in busy.items() if place == min(busy.values())]


def tell(standings: Mapping[int, Standing], world_size: int) -> str:
    """Write in one line which ranks keep the others waiting, and what for.

    Example:
        >>> late = Standing(step=3, phase="waiting for data", doing="read (tar.py:4)", seconds=61)
        >>> waiting = Standing(step=3, phase="step", doing="barrier (a.py:1)", waits=True)
        >>> tell({0: waiting, 1: late}, 2)  # doctest: +NORMALIZE_WHITESPACE
        'rank 1 is behind: waiting for data, step 3, for 61 s, in read (tar.py:4); rank 0 waiting
        in barrier (a.py:1), step 3'
    """
    culprits = name_culprits(standings, world_size)
    lines = [_blame(rank, standings.get(rank)) for rank in culprits[:_MOST_TOLD]]
    if len(culprits) > _MOST_TOLD:
        lines.append(f"so with rank {list_ranks(culprits[_MOST_TOLD:])}")
    if not culprits:
        lines.append("every rank waits for others: a network or a device is stuck")
    calls: dict[str, list[int]] = {}
    for rank, standing in sorted(standings.items()):
        if rank not in culprits:
            verb = "waiting in" if standing.waits else "in"
            what = f"{verb} {standing.doing}, {_moment(standing)}"
            calls.setdefault(what, []).append(rank)
    lines += [f"rank {list_ranks(ranks)} {what}" for what, ranks in calls.items()]
    return "; ".join(lines)


def _blame(rank: int, standing: Standing | None) -> str:
    if standing is None:
        return f"rank {rank} does not answer: it was killed, is stopped, or its node is gone"
    if standing.error:
        return f"rank {rank} failed in {_moment(standing)}: {standing.error}"
    return (
        f"rank {rank} is behind: {_moment(standing)}, for {standing.seconds:.0f} s, in "
        f"{standing.doing}"
    )


def _moment(standing: Standing) -> str:
    at = f"step {standing.step}"
    return at if standing.phase == "step" else f"{standing.phase}, {at}"
