"""When the main thread gets nowhere, who says so and ends this process?

A thread looks at how far the main one has come. After too long without progress, it finds
out with the other ranks who keeps whom waiting. If that rank takes longer than it may, all say it
in one line, write down what every thread was doing, and end their process: a rank that waits in a
collective cannot be woken in any other way. Nothing of this can take longer than some seconds.
"""

import faulthandler
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from dist_siglip.distributed.waiting import Doing, failed_doing, is_debugged, main_thread_doing
from dist_siglip.health.hang_report import Alarm, Standing, Verdict, tell
from dist_siglip.system.process_lock import check_place

logger = logging.getLogger(__name__)

EXIT_HUNG = 70

_LISTEN_SECONDS = 1.0  # between two looks at what others ask
_ANSWER_SECONDS = 3.0  # for the others to notice a question, and to answer
_AGAIN_SECONDS = 60.0  # until a rank that waits for a slow one asks again
_GRACE_SECONDS = 3.0  # for a main thread to fail by itself, with a better message
_LEAVE_SECONDS = 5.0  # the first rank, which may hold the store, stays for the others
_AFTER_FIRST_SECONDS = 1.5
_WRITE_SECONDS = 5.0  # for a disk or a terminal that may hang as well
_LOST = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|did not take part", re.I
)
_T = TypeVar("_T")
_occasions = count()


@dataclass(frozen=True, kw_only=True)
class Beat:
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


class Sentinel:
    """Watches the main thread from ``start`` to ``stop``.

    Distributed contract: every rank makes one, equally often; it talks through the store of the
    group, in threads of its own, and runs no collective.

    Args:
        beat: returns the newest sign of life, the same object until there is another.
        stacks: file for what every thread was doing when this process was ended.
        group: ranks of the run; None in a world of one.
        end_children: ends ranks that this process has started, before it ends itself.

    Attributes:
        blamed: what ``explain`` has found, if the ranks could confer.
    """

    def __init__(
        self,
        beat: Callable[[], Beat],
        *,
        stacks: Path,
        group: ProcessGroup | None,
        end_children: Callable[[], None],
    ) -> None:
        self._beat = beat
        self._stacks = stacks
        self._end_children = end_children
        self._stopped = threading.Event()
        self._verdict: Verdict | None = None
        self.blamed: Verdict | None = None
        self._is_ending = False
        self._idle_seconds = 0.0
        self._rank, self._world_size = 0, 1
        self._speaker: Alarm | None = None
        self._listener: Alarm | None = None
        if group is not None and group.size() > 1:
            self._rank, self._world_size = group.rank(), group.size()
            occasion = f"sentinel-{next(_occasions)}"
            # A connection for each thread: one that is stuck holds up no other.
            self._speaker, self._listener = (
                Alarm(
                    PrefixStore(occasion, group.get_group_store().clone()),
                    self._rank,
                    self._world_size,
                )
                for _ in range(2)
            )

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, name="sentinel", daemon=True).start()
        if self._listener is not None:
            threading.Thread(
                target=self._listen, args=(self._listener,), name="sentinel-ear", daemon=True
            ).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def explain(self, error: BaseException) -> str | None:
        """Tell the other ranks that this one fails, and return why if they are to blame.

        Watches no longer; takes some seconds at most.
        """
        if self._is_ending:
            time.sleep(_LEAVE_SECONDS)  # the sentinel's words are the better ones
        self.stop()
        alarm = self._speaker
        if alarm is None:
            return None
        is_lost = _is_for_want_of_others(error)
        standing = self._standing(
            failed_doing(error),
            waits=is_lost,
            error="" if is_lost else _in_one_line(error),
            exit_code=getattr(error, "exit_code", 0),
        )
        try:
            verdict = self._confer(alarm, standing, has_failed=True)
        except TimeoutError:
            return self._hears_nothing(standing) if is_lost else None
        if verdict is None:
            return None
        self.blamed = verdict
        self._leave(alarm, verdict)
        return verdict.line if is_lost and self._speaks(alarm) else None

    def _watch(self) -> None:
        """Count the seconds without progress in which this process was let run."""
        called_seconds, ask_after = 0.0, 0.0
        beat, last = self._beat(), time.monotonic()
        while not self._stopped.wait(tick := min(1.0, beat.limit_seconds / 20)):
            now = time.monotonic()
            # A process that was suspended, with its node or by its scheduler, has not hung.
            passed, last = min(now - last, 2 * tick), now
            newest = self._beat()
            if newest is not beat:
                self._idle_seconds, ask_after, beat = 0.0, 0.0, newest
            else:
                self._idle_seconds += passed
            called_seconds += passed if self._verdict is not None else 0.0
            if called_seconds > _GRACE_SECONDS:
                self._end(self._standing(main_thread_doing()))
            elif self._is_overdue(beat) and self._idle_seconds > ask_after and not is_debugged():
                self._ask()
                ask_after = self._idle_seconds + min(beat.limit_seconds, _AGAIN_SECONDS)
                last = time.monotonic()

    def _ask(self) -> None:
        """Find out with the others whether this is the end; where all is well, return."""
        standing = self._standing(main_thread_doing())
        alarm = self._speaker
        if alarm is not None:
            try:
                self._verdict = self._verdict or self._confer(alarm, standing, has_failed=False)
            except TimeoutError:
                self._end(standing)
            if self._verdict is None:
                return
        self._end(standing)

    def _listen(self, alarm: Alarm) -> None:
        """Answer another rank that asks; note the verdict."""
        answered = -1
        with suppress(RuntimeError):  # the store ends with its rank, as it should at the end
            while not self._stopped.wait(_LISTEN_SECONDS) and self._verdict is None:
                number = alarm.current_round()
                if number > answered and alarm.is_asked(number):
                    alarm.answer(number, self._standing(main_thread_doing()))
                    answered = number
                self._verdict = self._verdict or alarm.verdict()

    def _end(self, standing: Standing) -> None:
        """Say and write down what is wrong, and end this process."""
        if self._stopped.is_set():
            return  # the main thread has failed, or has got on after all
        self._is_ending = True
        alarm, verdict = self._speaker, self._verdict
        speaks, culprits, code = True, [self._rank], EXIT_HUNG
        if verdict is not None and alarm is not None:
            line, culprits, speaks = verdict.line, verdict.culprits, self._speaks(alarm)
            code = verdict.exit_code or EXIT_HUNG
        elif alarm is not None:
            line, culprits = self._hears_nothing(standing), []
        else:
            line = tell({self._rank: standing}, 1)
        is_culprit = self._rank in culprits
        _within(_WRITE_SECONDS, lambda: self._write(line, code, speaks, is_culprit))
        if verdict is not None and alarm is not None:
            self._leave(alarm, verdict)
        if self._rank > 0:
            # Lightning's launcher would kill the first rank before that has ended by itself.
            time.sleep(_AFTER_FIRST_SECONDS)
        _within(1.0, self._end_children)
        os._exit(code)

    def _confer(self, alarm: Alarm, standing: Standing, *, has_failed: bool) -> Verdict | None:
        """Return the verdict.

        Raises:
            TimeoutError: if the store does not answer.
        """
        answer = _within(
            5 * _ANSWER_SECONDS,
            lambda: alarm.confer(standing, _ANSWER_SECONDS, has_failed=has_failed),
        )
        if not answer:
            raise TimeoutError
        return answer[0]

    def _leave(self, alarm: Alarm, verdict: Verdict) -> None:
        _within(2 * _LEAVE_SECONDS, lambda: alarm.leave(verdict.num_answers, _LEAVE_SECONDS))

    def _speaks(self, alarm: Alarm) -> bool:
        """One line for all is enough; the first rank has the log as well."""
        return self._rank == 0 or _within(_WRITE_SECONDS, alarm.is_first_to_speak) == [True]

    def _hears_nothing(self, standing: Standing) -> str:
        return (
            f"rank {self._rank} hears nothing of the others: rank 0, which keeps their store, was "
            f"killed, is stopped, or its node is gone; rank {self._rank} is in {standing.doing}"
        )

    def _write(self, line: str, code: int, speaks: bool, is_culprit: bool) -> None:
        """Say it, if it is up to this rank; write every stack to a file, and a culprit's aloud."""
        if speaks:
            logger.error("nothing gets on: %s; ending with code %d", line, code)
        if is_culprit and sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__)
        with suppress(OSError):
            check_place(self._stacks)
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            self._stacks.unlink(missing_ok=True)  # a pipe there would wait for a reader
            with self._stacks.open("w", encoding="utf-8") as file:
                file.write(f"{line}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)

    def _is_overdue(self, beat: Beat) -> bool:
        return self._idle_seconds > beat.limit_seconds

    def _standing(
        self, doing: Doing, *, waits: bool | None = None, error: str = "", exit_code: int = 0
    ) -> Standing:
        beat = self._beat()
        return Standing(
            step=beat.step,
            phase=beat.phase,
            order=beat.order,
            doing=doing.what,
            waits=doing.waits if waits is None else waits,
            seconds=self._idle_seconds,
            is_overdue=self._is_overdue(beat),
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
