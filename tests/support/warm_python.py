"""A stand-in for ``python`` that needs no imports: ``-m MODULE`` is forked from a warm process.

Importing torch and Lightning takes twelve seconds of processor time, and a launcher (SLURM,
torchrun, Lightning's own) starts an interpreter for every rank. As a script this file is what the
launcher starts. It asks a server for a process with its arguments, environment, folder and open
files; hands signals on to it; and ends as it ends. If it is killed, so is that process with what
it started. So a launcher sees the rank that it started do what a rank does.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress

_HANDED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
_SECONDS_TO_NOTICE = 5.0


def stand_in(server: str, arguments: list[str]) -> int:
    """Be the process that a server starts; return its exit code, negative for a signal."""
    numbers = [getattr(signal, name) for name in _HANDED_ON]
    request = {
        "arguments": arguments,
        "environ": dict(os.environ),
        "folder": os.getcwd(),
        "parent": os.getppid(),
        "ignored": [n for n in numbers if signal.getsignal(n) is signal.SIG_IGN],
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        connection.sendall(json.dumps(request).encode() + b"\n")
        answers = connection.makefile()
        process = int(answers.readline())

        def hand_on(number, _):
            with suppress(ProcessLookupError):
                os.kill(process, number)

        for number in numbers:
            signal.signal(number, hand_on)
        return int(answers.readline() or 1)


def write_stand_in(path: str, server: str) -> None:
    """Write an executable that is called as ``python`` is; all but ``-m`` gets the real one."""
    with open(path, "w") as file:
        file.write(
            f'#!/bin/sh\n[ "$1" = -u ] && shift\n[ "$1" = -m ] || exec {sys.executable} "$@"\n'
            f'shift; exec {sys.executable} -I -S {__file__} {server} "$@"\n'
        )
    os.chmod(path, 0o755)


def serve(path: str) -> None:
    """Fork what is asked for at a socket, until the process that forked this one is gone."""
    import selectors

    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        while os.getppid() == parent:
            for key, _ in selector.select(_SECONDS_TO_NOTICE):
                if key.fileobj is listener:
                    _start(listener.accept()[0], selector)
                elif isinstance(key.fileobj, int):
                    selector.unregister(key.fileobj)
                    os.close(key.fileobj)
                    process, connection = key.data
                    process.join()
                    with suppress(OSError):
                        connection.sendall(b"%d\n" % process.exitcode)
                else:  # whoever asked says nothing more: it has ended
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    _kill(key.data)


def _start(connection, selector) -> None:
    import multiprocessing
    import selectors

    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    fork = multiprocessing.get_context("fork")
    process = fork.Process(
        target=_run, args=(request, files, [connection.fileno(), *selector.get_map()])
    )
    process.start()
    for file in files:
        os.close(file)
    connection.sendall(b"%d\n" % process.pid)
    ended = os.pidfd_open(process.pid)
    selector.register(ended, selectors.EVENT_READ, (process, connection))
    selector.register(connection, selectors.EVENT_READ, process)


def _kill(process) -> None:
    """End a process with all it has started, unless it has ended."""
    if process.exitcode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # that was before it had a group


def _run(request, files, of_the_server) -> None:
    import faulthandler

    os.setsid()
    for file in of_the_server:
        os.close(file)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0)  # noqa: SIM115 - until the process ends
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["folder"])
    os.getppid = lambda: request["parent"]  # which tells ranks of Lightning whose they are
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    run_module(*request["arguments"])


def run_module(module: str, *arguments: str) -> None:
    """Run a module as ``python -m`` does."""
    import runpy

    sys.argv = ["", *arguments]
    sys.path.insert(0, os.getcwd())
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _code = stand_in(sys.argv[1], sys.argv[2:])
    if _code < 0:
        signal.signal(-_code, signal.SIG_DFL)
        os.kill(os.getpid(), -_code)
    sys.exit(_code)
