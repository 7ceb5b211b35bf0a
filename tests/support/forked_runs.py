"""Starts of the command line that cost no imports: forked from a process that has done them.

A start of ``fit`` spends most of its time on imports. A test that needs fifty of them forks each
from one server; from there on it is the command as a user starts it, in a session of its own, with
its output in a file, and it can be killed at any time with everything it started.
"""

import atexit
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tests.support.ports import next_port
from tests.support.processes import IMPORTED_ONCE, LIMIT_SECONDS
from tests.support.torchrun import pretend_torchrun
from tests.support.warm_python import run_module, serve, write_stand_in


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


@cache
def warm_python() -> Path:
    """Return an executable that launchers may start instead of ``python``, without imports."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    python, socket = folder / "python", folder / "socket"
    server = _server().Process(target=serve, args=(str(socket),))
    server.start()
    # Before those of multiprocessing, which would wait for it.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not socket.exists():
        assert server.is_alive(), "the server ended by itself"
        assert time.monotonic() < deadline, "the server never came"
        time.sleep(0.01)
    write_stand_in(str(python), str(socket))
    return python


@dataclass
class ForkedRun:
    """One start, on one rank or several."""

    log: Path
    ranks: list[BaseProcess] = field(default_factory=list)

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL a rank, or all at once, with what they started."""
        for each in self.ranks if rank is None else [self.ranks[rank]]:
            _kill(each)
        if rank is not None:
            self._send_all(signal.SIGCONT)  # those that ``catch`` has stopped go on

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to a rank."""
        os.kill(self.ranks[rank].pid, number)

    def wait(self, seconds: float = LIMIT_SECONDS) -> list[int]:
        """Return the exit codes of all ranks."""
        deadline = time.monotonic() + seconds
        for each in self.ranks:
            each.join(max(0.0, deadline - time.monotonic()))
        alive = [each.pid for each in self.ranks if each.exitcode is None]
        if alive:
            self.kill()
            raise TimeoutError(f"{alive} ran past {seconds} s:\n{self.said()}")
        return [each.exitcode for each in self.ranks]

    def wait_until(self, is_time: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> bool:
        """Wait for a moment, looking all the time; return whether every rank is still there."""
        deadline = time.monotonic() + seconds
        while not is_time():
            if any(rank.exitcode is not None for rank in self.ranks):
                return False
            assert time.monotonic() < deadline, f"the moment never came:\n{self.said()}"
            time.sleep(0.0002)
        return True

    def catch(self, is_so: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
        """Stop all ranks at a moment at which something is so, and stays so: nothing moves.

        However busy the machine is: a moment that was over before they stood still is let go.
        """
        assert self.wait_until(is_so, seconds), self.said()
        while not self._is_so_at_rest(is_so):
            self._send_all(signal.SIGCONT)
            assert self.wait_until(is_so, seconds), self.said()

    def _is_so_at_rest(self, is_so: Callable[[], bool]) -> bool:
        self._send_all(signal.SIGSTOP)
        assert self.wait_until(lambda: all(_is_at_rest(rank.pid) for rank in self.ranks))
        return is_so()

    def _send_all(self, number: int) -> None:
        for rank in self.ranks:
            with suppress(ProcessLookupError):  # it has no session yet, or has ended
                os.killpg(rank.pid, number)

    def said(self) -> str:
        """Standard output and error of all ranks."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def start(arguments: list[object], log: Path, world_size: int = 1) -> ForkedRun:
    """Start ``dist-siglip ARGUMENTS``; several ranks as torchrun starts them."""
    run = ForkedRun(log)
    port, python = next_port(), str(warm_python())
    for rank in range(world_size):
        process = _server().Process(
            target=_run,
            args=(
                json.dumps([str(a) for a in arguments]),
                str(log),
                python,
                rank,
                world_size,
                port,
            ),
        )
        process.start()
        run.ranks.append(process)
    return run


class Ended(NamedTuple):
    """What a start left behind: as ``subprocess.CompletedProcess``, with both outputs in one."""

    returncode: int
    stderr: str


def run_forked(
    *arguments: object, world_size: int = 1, timeout_seconds: float = LIMIT_SECONDS
) -> Ended:
    """Run ``dist-siglip ARGUMENTS`` to its end; the code is the first rank's that is not 0."""
    with tempfile.TemporaryDirectory() as folder:
        run = start(list(arguments), Path(folder) / "said.txt", world_size)
        codes = run.wait(timeout_seconds)
        return Ended(next((code for code in codes if code), 0), run.said())


def _is_at_rest(pid: int) -> bool:
    """Whether every thread of a process is stopped or gone, and none still writes."""
    states = []
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.append(thread.read_text().rpartition(")")[2].split()[0])
    return set(states) <= set("TZX")


def _kill(process: BaseProcess) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no session yet, or has ended
        process.kill()


def _run(arguments: str, log: str, python: str, rank: int, world_size: int, port: int) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if world_size > 1:
        pretend_torchrun(rank, world_size)
    os.environ["MASTER_PORT"] = str(port)
    sys.executable = python
    run_module("dist_siglip", *json.loads(arguments))
