"""Hang watchdog: a thread that ends this process when the main thread stalls.

After too long without progress it polls the other ranks and finds those that keep the rest
waiting. If those take longer than they may, all ranks report it in one line, write the stacks of
their threads and end: a rank that waits in a collective cannot be woken in any other way. Nothing
of this can take longer than some seconds.
"""

import faulthandler
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from dist_siglip.distributed.waiting import Doing, failed_doing, is_debugged, main_thread_doing
from dist_siglip.health.hang_report import HangReport, RankStatus, Verdict, describe
from dist_siglip.system.process_lock import check_place

logger = logging.getLogger(__name__)

EXIT_HUNG = 70

_LISTEN_SECONDS = 1.0  # between two looks at what others ask
_ANSWER_SECONDS = 3.0  # for the others to notice a question of a failed rank, and to answer
_PATIENCE_SECONDS = 20.0  # the same where none has failed: one on a busy node may be slow to answer
_AGAIN_SECONDS = 60.0  # until a rank that waits for a slow one asks again
_GRACE_SECONDS = 3.0  # for a main thread to fail by itself, with a better message
_LEAVE_SECONDS = 5.0  # the first rank, which may hold the store, stays for the others
_AFTER_FIRST_SECONDS = 1.5
_WRITE_SECONDS = 5.0  # for a disk or a terminal that may hang as well
_LOST = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|did not take part", re.I
)
_MOST_MARKS = 16
_T = TypeVar("_T")
_occasions = count()


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """How far the main thread has come.

    Attributes:
        step: training step, counted from 1.
        phase: part of it, in words.
        order: of phases within a step; a smaller one comes first.
        limit_seconds: how long it may take.
    """

    step: int
    phase: str
    order: int
    limit_seconds: float


class DeviceProgress:
    """How far a device has come with what the host has launched.

    On NCCL no call of the host waits for other ranks: the device does, and sooner or later the host
    waits for the device, whatever it does. An event at the ends of a step tells.

    Args:
        make_event: records an event on the device, whose ``query`` says whether it has passed.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self._make_event = make_event
        self._marks: deque[tuple[int, Any]] = deque(maxlen=_MOST_MARKS)

    def mark(self, step: int) -> None:
        """Note that what the host has launched so far belongs to a step."""
        self._marks.append((step, self._make_event()))

    def unfinished_step(self) -> int | None:
        """Return the first step that the device has not finished; None if it has nothing to do."""
        for step, event in list(self._marks):
            if not event.query():
                return step
        return None


class HangWatchdog:
    """Watches the main thread from ``start`` to ``stop``.

    Distributed contract: every rank makes one, equally often; it talks through the store of the
    group, in threads of its own, and runs no collective.

    Args:
        heartbeat: returns the newest sign of life, the same object until there is another.
        stacks: file for what every thread was doing when this process was ended.
        group: ranks of the run; None in a world of one.
        end_children: ends ranks that this process has started, before it ends itself.
        device: what the device of this rank has done; None for a CPU.

    Attributes:
        verdict: what ``explain`` has found, if the ranks could be polled.
    """

    def __init__(
        self,
        heartbeat: Callable[[], Heartbeat],
        *,
        stacks: Path,
        group: ProcessGroup | None,
        end_children: Callable[[], None],
        device: DeviceProgress | None = None,
    ) -> None:
        self._heartbeat = heartbeat
        self._device = device
        self._stacks = stacks
        self._end_children = end_children
        self._stopped = threading.Event()
        self._verdict: Verdict | None = None
        self.verdict: Verdict | None = None
        self._is_ending = False
        self._idle_seconds = 0.0
        self._rank, self._world_size = 0, 1
        self._speaker: HangReport | None = None
        self._listener: HangReport | None = None
        if group is not None and group.size() > 1:
            self._rank, self._world_size = group.rank(), group.size()
            occasion = f"watchdog-{next(_occasions)}"
            # A connection for each thread: one that is stuck holds up no other.
            self._speaker, self._listener = (
                HangReport(
                    PrefixStore(occasion, group.get_group_store().clone()),
                    self._rank,
                    self._world_size,
                )
                for _ in range(2)
            )

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if self._listener is not None:
            threading.Thread(
                target=self._listen, args=(self._listener,), name="watchdog-answers", daemon=True
            ).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def explain(self, error: BaseException) -> str | None:
        """Tell the other ranks that this one fails, and return why if they caused it.

        Watches no longer; takes some seconds at most. If this rank failed because the others ended
        a hang, it ends with their code, without returning.
        """
        if self._is_ending:
            time.sleep(_LEAVE_SECONDS)  # the watchdog's words are the better ones
        self.stop()
        report = self._speaker
        if report is None:
            return None
        is_lost = _is_for_want_of_others(error)
        status = self._status(
            failed_doing(error),
            waits=is_lost,
            error="" if is_lost else _in_one_line(error),
            exit_code=getattr(error, "exit_code", 0),
        )
        try:
            verdict = self._poll(report, status, has_failed=True)
        except TimeoutError:
            return self._hears_nothing(status) if is_lost else None
        if verdict is None:
            return None
        self.verdict = verdict
        if is_lost and verdict.is_hang:  # the others have ended already, on a busy machine
            self._verdict = verdict
            self._leave_for_good(status)
        self._leave(report, verdict)
        return verdict.line if is_lost and self._speaks(report) else None

    def _watch(self) -> None:
        """Count the seconds without progress in which this process was let run."""
        called_seconds, ask_after = 0.0, 0.0
        heartbeat, last = self._heartbeat(), time.monotonic()
        while not self._stopped.wait(tick := min(1.0, heartbeat.limit_seconds / 20)):
            now = time.monotonic()
            # A process that was suspended, with its node or by its scheduler, has not hung.
            passed, last = min(now - last, 2 * tick), now
            newest = self._heartbeat()
            if newest is not heartbeat:
                self._idle_seconds, ask_after, heartbeat = 0.0, 0.0, newest
            else:
                self._idle_seconds += passed
            called_seconds += passed if self._verdict is not None else 0.0
            if called_seconds > _GRACE_SECONDS:
                self._end(self._status(self._doing()))
            elif self._is_overdue(newest) and self._idle_seconds > ask_after and not is_debugged():
                self._ask()
                ask_after = self._idle_seconds + min(heartbeat.limit_seconds, _AGAIN_SECONDS)
                last = time.monotonic()

    def _ask(self) -> None:
        """Find out with the others whether this is the end; where all is well, return."""
        status = self._status(self._doing())
        report = self._speaker
        if report is not None:
            try:
                self._verdict = self._verdict or self._poll(report, status, has_failed=False)
            except TimeoutError:
                self._end(status)
            if self._verdict is None:
                return
        self._end(status)

    def _listen(self, report: HangReport) -> None:
        """Answer another rank that asks; note the verdict."""
        answered = -1
        with suppress(RuntimeError):  # the store ends with its rank, as it should at the end
            while not self._stopped.wait(_LISTEN_SECONDS) and self._verdict is None:
                number = report.current_round()
                if number > answered and report.is_asked(number):
                    report.answer(number, self._status(self._doing()))
                    answered = number
                self._verdict = self._verdict or report.verdict()

    def _end(self, status: RankStatus) -> None:
        """Say and write down what is wrong, and end this process."""
        if self._stopped.is_set():
            return  # the main thread has failed, or has got on after all
        self._is_ending = True
        self._leave_for_good(status)

    def _leave_for_good(self, status: RankStatus) -> None:
        report, verdict = self._speaker, self._verdict
        speaks, stalled, code = True, [self._rank], EXIT_HUNG
        if verdict is not None and report is not None:
            line, stalled, speaks = verdict.line, verdict.stalled, self._speaks(report)
            code = verdict.exit_code or EXIT_HUNG
        elif report is not None:
            line, stalled = self._hears_nothing(status), []
        else:
            line = describe({self._rank: status}, 1)
        is_stalled = self._rank in stalled
        _within(_WRITE_SECONDS, lambda: self._write(line, code, speaks, is_stalled))
        if verdict is not None and report is not None:
            self._leave(report, verdict)
        if self._rank > 0:
            # Lightning's launcher would kill the first rank before that has ended by itself.
            time.sleep(_AFTER_FIRST_SECONDS)
        _within(1.0, self._end_children)
        os._exit(code)

    def _poll(self, report: HangReport, status: RankStatus, *, has_failed: bool) -> Verdict | None:
        """Return the verdict.

        Raises:
            TimeoutError: if the store does not answer.
        """
        seconds = _ANSWER_SECONDS if has_failed else _PATIENCE_SECONDS
        if not _within(5 * _ANSWER_SECONDS, report.current_round):
            raise TimeoutError
        answer = _within(5 * seconds, lambda: report.poll(status, seconds, has_failed=has_failed))
        if not answer:
            raise TimeoutError
        return answer[0]

    def _leave(self, report: HangReport, verdict: Verdict) -> None:
        _within(2 * _LEAVE_SECONDS, lambda: report.leave(verdict.num_answers, _LEAVE_SECONDS))

    def _speaks(self, report: HangReport) -> bool:
        """One line for all is enough; the first rank has the log as well."""
        return self._rank == 0 or _within(_WRITE_SECONDS, report.is_first_to_speak) == [True]

    def _hears_nothing(self, status: RankStatus) -> str:
        return (
            f"rank {self._rank} hears nothing of the others: rank 0, which keeps their store, was "
            f"killed, is stopped, or its node is gone; rank {self._rank} is in {status.doing}"
        )

    def _write(self, line: str, code: int, speaks: bool, is_stalled: bool) -> None:
        """Log the line if this rank speaks; write stacks to a file, and to stderr if stalled."""
        if speaks:
            logger.error("training stalled: %s; ending with code %d", line, code)
        if is_stalled and sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__)
        with suppress(OSError):
            check_place(self._stacks)
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            self._stacks.unlink(missing_ok=True)  # a pipe there would wait for a reader
            with self._stacks.open("w", encoding="utf-8") as file:
                file.write(f"{line}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)

    def _doing(self) -> Doing:
        """What the main thread does; a rank whose device is not done with a step waits for it."""
        doing = main_thread_doing()
        step = None if self._device is None else self._device.unfinished_step()
        if step is None or doing.waits:
            return doing
        return Doing(f"{doing.what}, while its device has not finished step {step}", waits=True)

    def _is_overdue(self, heartbeat: Heartbeat) -> bool:
        return self._idle_seconds > heartbeat.limit_seconds

    def _status(
        self, doing: Doing, *, waits: bool | None = None, error: str = "", exit_code: int = 0
    ) -> RankStatus:
        heartbeat = self._heartbeat()
        return RankStatus(
            step=heartbeat.step,
            phase=heartbeat.phase,
            order=heartbeat.order,
            doing=doing.what,
            waits=doing.waits if waits is None else waits,
            seconds=self._idle_seconds,
            is_overdue=self._is_overdue(heartbeat),
            error=error,
            exit_code=exit_code,
        )


def _is_for_want_of_others(error: BaseException | None) -> bool:
    """Whether a call failed because another rank did not do its part."""
    while error is not None:
        if isinstance(error, RuntimeError) and _LOST.search(str(error)):
            return True
        error = error.__cause__
    return False


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _within(seconds: float, function: Callable[[], _T]) -> list[_T]:
    """Return what ``function`` returns, as the only item; none if it fails, or takes longer."""
    results: list[_T] = []

    def call() -> None:
        with suppress(RuntimeError, OSError):
            results.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results
