"""``dist-siglip doctor`` on ranks of which some are ill: each rank forked, with what ails it."""

import json
import os
import time
from pathlib import Path

from tests.support import forked_runs
from tests.support.forked_runs import ForkedRun
from tests.support.ports import next_port
from tests.support.torchrun import pretend_torchrun


def start_doctors(
    log: Path,
    *arguments: object,
    world_size: int = 2,
    absent: tuple[int, ...] = (),
    ills: dict[int, tuple[str, ...]] | None = None,
    own_arguments: dict[int, list[object]] | None = None,
) -> ForkedRun:
    """Start ``doctor`` on nodes n0, n1, ... of one rank each; ``absent`` ranks never come.

    ``ills`` names functions of this module, called in a rank before the command.
    """
    run = ForkedRun(log)
    port = next_port()
    for rank in range(world_size):
        if rank in absent:
            continue
        words = [str(a) for a in (*arguments, *(own_arguments or {}).get(rank, ()))]
        process = forked_runs._server().Process(
            target=_run,
            args=(json.dumps(words), str(log), rank, world_size, port, (ills or {}).get(rank, ())),
        )
        process.start()
        run.ranks.append(process)
    return run


def _run(
    arguments: str, log: str, rank: int, world_size: int, port: int, ills: tuple[str, ...]
) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    pretend_torchrun(rank, world_size)
    os.environ |= {
        "MASTER_PORT": str(port),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "SLURMD_NODENAME": f"n{rank}",
    }
    for ill in ills:
        globals()[ill]()
    from dist_siglip import cli

    raise SystemExit(cli.main(["doctor", *json.loads(arguments)]))


def clock_ahead() -> None:
    now = time.time
    time.time = lambda: now() + 400


def other_code() -> None:
    from dist_siglip.doctor import machine as doctor_machine

    doctor_machine.digest_of_sources = lambda: "0123456789ab"


def wrong_sums() -> None:
    from dist_siglip.doctor import links

    right = links.exchange_and_sum
    links.exchange_and_sum = lambda *given: tuple(part + 1 for part in right(*given))


def no_sync() -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    os.fsync = fail


def hangs_looking() -> None:
    from dist_siglip.doctor import machine as doctor_look

    doctor_look.look_at_shards = lambda *given: time.sleep(1000)


def dies_measuring() -> None:
    from dist_siglip.doctor import links

    links.exchange_and_sum = lambda *given: os._exit(9)


def hangs_measuring() -> None:
    from dist_siglip.doctor import links

    links.exchange_and_sum = lambda *given: time.sleep(1000)
