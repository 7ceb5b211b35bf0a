"""Work on many items in processes of their own, so that a crash or a hang costs one item.

One forked process for each item, ended when it takes too long. What a damaged file does to a
decoder written in C stays in that process.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, NamedTuple, TypeVar

from dist_siglip.errors import OutageError, UserError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Outcome(NamedTuple, Generic[_Item, _Result]):
    """What became of one item: a result, or the reason why there is none."""

    item: _Item
    result: _Result | None
    failure: str


class _Running(NamedTuple, Generic[_Item]):
    item: _Item
    process: BaseProcess
    ends_at: float


def map_isolated(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    *,
    workers: int,
    limit_seconds: float = 3600.0,
) -> Iterator[Outcome[_Item, _Result]]:
    """Call a function on every item, several at a time; yield outcomes as they come.

    Args:
        function: its result must be picklable.
        items: anything; the process inherits it.
        workers: processes at a time, >= 1.
        limit_seconds: longest time for one item; then its process is killed.

    Raises:
        UserError: if ``workers`` is below 1, or the function raises one.
        OutageError: as the function raises it.
    """
    if workers < 1:
        raise UserError(f"workers ({workers}) must be at least 1")
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(items))
    running: dict[Connection, _Running[_Item]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                item = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(function, item, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = _Running(item, process, time.monotonic() + limit_seconds)
            pause = max(0.0, min(one.ends_at for one in running.values()) - time.monotonic())
            ready = wait(list(running), timeout=pause)
            late = [one for one, job in running.items() if time.monotonic() >= job.ends_at]
            for one in [one for one in running if one in ready or one in late]:
                yield _outcome(one, running.pop(one), limit_seconds)
    finally:
        for job in running.values():
            job.process.kill()


def _work(function: Callable[[_Item], _Result], item: _Item, sender: Connection) -> None:
    try:
        sender.send((function(item), None))
    except (UserError, OutageError) as error:
        sender.send((None, error))


def _outcome(
    receiver: Connection, job: _Running[_Item], limit_seconds: float
) -> Outcome[_Item, _Result]:
    """Take the result of a process that has one, or say what became of it."""
    if not receiver.poll():
        job.process.kill()
        job.process.join()
        receiver.close()
        return Outcome(job.item, None, f"took longer than {limit_seconds:g} s")
    try:
        result, error = receiver.recv()
    except EOFError:
        job.process.join()
        return Outcome(job.item, None, f"its process ended with code {job.process.exitcode}")
    finally:
        receiver.close()
    job.process.join()
    if error is not None:
        raise error
    return Outcome(job.item, result, "")
