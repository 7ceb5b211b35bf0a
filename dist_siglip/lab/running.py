"""Who runs which experiment, and how far is it?

Each experiment runs in a process with one thread, several at a time, the longest first: small
matrices are several times faster on one thread than on two.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_siglip.errors import UserError
from dist_siglip.lab.catalogue import EXPERIMENTS, check_names, function_of
from dist_siglip.lab.experiment import LabSettings
from dist_siglip.lab.records import Record, write_record

_LOOK_SECONDS = 0.2
_LEAST_PROGRESS = 0.005  # what is worth a message


class Order(NamedTuple):
    """What to run.

    Attributes:
        names: of the experiments.
        out: folder of the results.
        quick: only the quick subset of each.
        seed: added to the authors' seeds.
    """

    names: Sequence[str]
    out: Path
    quick: bool = False
    seed: int = 0


def run_experiments(
    order: Order, *, workers: int = 2, on_progress: Callable[[str, float], None]
) -> Iterator[Record]:
    """Run experiments and write their results; yield each when it is done.

    One that fails does not end the others; what it raised is raised last.

    Args:
        order: what to run.
        workers: processes at a time; with 1 everything runs in this process.
        on_progress: called with a name and the share of that experiment that is done.

    Raises:
        UserError: if there is no such experiment, or ``workers`` is below 1.
    """
    check_names(list(order.names))
    if workers < 1:
        raise UserError(f"workers ({workers}) must be at least 1")
    longest_first = sorted(dict.fromkeys(order.names), key=lambda name: -EXPERIMENTS[name].minutes)
    if workers == 1:
        for name in longest_first:
            yield _run_here(name, order, on_progress)
        return
    context = multiprocessing.get_context("spawn")
    messages: multiprocessing.Queue[tuple[str, float]] = context.Queue()
    with ProcessPoolExecutor(
        min(workers, len(longest_first)),
        mp_context=context,
        initializer=_remember,
        initargs=(messages,),
    ) as pool:
        try:
            futures = {pool.submit(_run_there, name, order) for name in longest_first}
            yield from _finished(futures, lambda: _pass_on(messages, on_progress))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _finished(waiting: set[Future[Record]], look: Callable[[], None]) -> Iterator[Record]:
    """Yield what comes; raise what one raised after the others are done."""
    failures: list[Future[Record]] = []
    while waiting:
        done, waiting = wait(waiting, _LOOK_SECONDS, FIRST_COMPLETED)
        look()
        failures += [future for future in done if future.exception() is not None]
        yield from (future.result() for future in done if future not in failures)
    for future in failures:
        future.result()


_messages: Any = None  # the queue of this worker process


def _remember(messages: Any) -> None:
    """Start a worker process."""
    global _messages
    _messages = messages


def _run_there(name: str, order: Order) -> Record:
    last = 0.0

    def tell(_: str, done: float) -> None:
        nonlocal last
        if done - last >= _LEAST_PROGRESS or done >= 1:
            last = done
            _messages.put((name, done))

    return _run_here(name, order, tell)


def _run_here(name: str, order: Order, on_progress: Callable[[str, float], None]) -> Record:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = _cpu_seconds()
    try:
        outcome = function_of(name)(
            LabSettings(
                quick=order.quick,
                seed=order.seed,
                progress=lambda done: on_progress(name, done),
            )
        )
    finally:
        torch.set_num_threads(threads)
    return write_record(
        order.out,
        name,
        outcome,
        quick=order.quick,
        seed=order.seed,
        cpu_seconds=_cpu_seconds() - started,
    )


def _pass_on(messages: Any, on_progress: Callable[[str, float], None]) -> None:
    """Tell what the workers told since the last look."""
    while not messages.empty():
        on_progress(*messages.get())


def _cpu_seconds() -> float:
    """Of this process and of those it started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
