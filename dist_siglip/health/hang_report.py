"""Collects the status of all ranks and finds the stalled ones.

Ranks talk through the store that brought them together, never by a collective, which would hang
where the others hang. One rank asks; all write down their status; the one that asked reads it
and decides: the run ends, and why, or the others are only slow. A process that is stopped or gone
writes nothing.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from dist_siglip.distributed.store_channel import StoreChannel
from dist_siglip.health.start_check import list_ranks

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_MOST_TOLD = 3


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """Status of a rank.

    Attributes:
        step: training step it is at, counted from 1.
        phase: part of the step, in words.
        order: of phases within a step; a smaller one comes first.
        doing: call it is in.
        waits: whether that call waits for other ranks.
        seconds: since its last progress.
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
        stalled: ranks that keep the others waiting.
        num_answers: ranks that have answered, and so can read this.
        exit_code: with which all ranks are to end; 0 leaves it to each.
        is_hang: whether a rank that waited found it, and none has failed.
    """

    line: str
    stalled: list[int]
    num_answers: int
    exit_code: int = 0
    is_hang: bool = False


class HangReport:
    """A poll of all ranks through a store, in numbered rounds.

    Args:
        store: a connection that serves nothing else: another thread may hold the usual one.
        rank: of this process.
        world_size: ranks that may answer.
    """

    def __init__(self, store: "Store", rank: int, world_size: int) -> None:
        self.store = store
        self.world_size = world_size
        self._channel = StoreChannel(store, rank, world_size)

    def current_round(self) -> int:
        """Return the number of the round that is not yet decided."""
        return int(self.store.add("round", 0))

    def is_asked(self, number: int) -> bool:
        """Whether a rank has asked for the status of all."""
        return bool(self.store.check([f"{number}/asked"]))

    def answer(self, number: int, status: RankStatus) -> None:
        """Write down the status of this rank."""
        self._channel.publish(str(number), asdict(status))

    def verdict(self) -> Verdict | None:
        """Return why the run ends, if it does."""
        found = self._channel.receive_now("verdict")
        return None if found is None else Verdict(**found)

    def poll(self, status: RankStatus, seconds: float, *, has_failed: bool) -> Verdict | None:
        """Ask for the status of all ranks, or answer the one that asks; return what is decided.

        Takes at most four times ``seconds``.

        Args:
            status: of this rank.
            seconds: to wait for answers.
            has_failed: whether this rank ends whatever the others say.

        Returns:
            None if the run goes on.
        """
        for _ in range(2):  # the rank that asks may be gone before it decides
            if (decided := self.verdict()) is not None:
                return decided
            number = self.current_round()
            self.answer(number, status)
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
        told = enumerate(self._channel.gather(str(number), seconds))
        statuses = {rank: RankStatus(**status) for rank, status in told if status is not None}
        verdict = None
        if has_failed or must_end(statuses, self.world_size):
            stalled = stalled_ranks(statuses, self.world_size)
            line = describe(statuses, self.world_size)
            code = max(status.exit_code for status in statuses.values())
            is_hang = not has_failed and not any(s.error for s in statuses.values())
            verdict = Verdict(line, stalled, len(statuses), code, is_hang)
            self._channel.broadcast("verdict", verdict._asdict())
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
        self._channel.leave(num_answers, seconds)


def must_end(statuses: Mapping[int, RankStatus], world_size: int) -> bool:
    """Whether a run is stalled, or only waits for a rank that takes its time.

    Example:
        >>> waiting = RankStatus(step=3, waits=True, is_overdue=True)
        >>> must_end({0: waiting, 1: RankStatus(step=2, phase="evaluation")}, 2)
        False
        >>> must_end({0: waiting, 1: RankStatus(step=2, is_overdue=True)}, 2)
        True
        >>> must_end({0: waiting}, 2)
        True
    """
    stalled = stalled_ranks(statuses, world_size)
    found = [statuses.get(rank) for rank in stalled]
    return not found or any(s is None or s.error or s.is_overdue for s in found)


def stalled_ranks(statuses: Mapping[int, RankStatus], world_size: int) -> list[int]:
    """Return the ranks that keep the others waiting; empty if it cannot be told.

    Those that failed; else those that do not answer; else, of the ranks that do not wait for
    others, the ones furthest behind.

    Example:
        >>> stalled_ranks({0: RankStatus(step=2, waits=True), 1: RankStatus(step=2)}, 2)
        [1]
        >>> stalled_ranks({0: RankStatus(step=2, waits=True)}, 2)
        [1]
    """
    failed = [rank for rank, status in sorted(statuses.items()) if status.error]
    if failed:
        return failed
    silent = [rank for rank in range(world_size) if rank not in statuses]
    if silent:
        return silent
    busy = {rank: (s.step, s.order) for rank, s in sorted(statuses.items()) if not s.waits}
    return [rank for rank, place in busy.items() if place == min(busy.values())]


def describe(statuses: Mapping[int, RankStatus], world_size: int) -> str:
    """Write in one line which ranks keep the others waiting, and what for.

    Example:
        >>> late = RankStatus(step=3, phase="waiting for data", doing="read (tar.py:4)", seconds=61)
        >>> waiting = RankStatus(step=3, phase="step", doing="barrier (a.py:1)", waits=True)
        >>> describe({0: waiting, 1: late}, 2)  # doctest: +NORMALIZE_WHITESPACE
        'rank 1 is behind: waiting for data, step 3, for 61 s, in read (tar.py:4); rank 0 waiting
        in barrier (a.py:1), step 3'
    """
    stalled = stalled_ranks(statuses, world_size)
    lines = [_describe(rank, statuses.get(rank)) for rank in stalled[:_MOST_TOLD]]
    if len(stalled) > _MOST_TOLD:
        lines.append(f"so with rank {list_ranks(stalled[_MOST_TOLD:])}")
    if not stalled:
        lines.append("every rank waits for others: a network or a device is stuck")
    calls: dict[str, list[int]] = {}
    for rank, status in sorted(statuses.items()):
        if rank not in stalled:
            how = "waiting in" if status.waits else "in"
            what = f"{how} {status.doing}, {_moment(status)}"
            calls.setdefault(what, []).append(rank)
    lines += [f"rank {list_ranks(ranks)} {what}" for what, ranks in calls.items()]
    return "; ".join(lines)


def _describe(rank: int, status: RankStatus | None) -> str:
    if status is None:
        return f"rank {rank} does not answer: it was killed, is stopped, or its node is gone"
    if status.error:
        return f"rank {rank} failed in {_moment(status)}: {status.error}"
    return (
        f"rank {rank} is behind: {_moment(status)}, for {status.seconds:.0f} s, in {status.doing}"
    )


def _moment(status: RankStatus) -> str:
    at = f"step {status.step}"
    return at if status.phase == "step" else f"{status.phase}, {at}"
