"""Ranks that hang, stop, die or fail under a watchdog: a script, because they end their process.

Prints a JSON object: scenario -> [[exit code, stderr, stacks] of each rank].
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dist_siglip.distributed import sum_over_ranks
from dist_siglip.health.hang_watchdog import HangWatchdog, Heartbeat

WORLD_SIZE = 3
# No step takes a tenth of it, so that a busy machine raises no alarm of its own.
STALL_SECONDS = 5.0
SUSPENDED_LIMIT_SECONDS = 20.0
SUSPENDED_SECONDS = 25.0  # longer than the job may take for a step
LIMIT_SECONDS = 400.0  # of all; who has not ended by itself is killed


def sleep_in_the_data():
    time.sleep(1000)


def read_batch(rank, scenario, step, folder):
    """The part of a step in which things go wrong at step 3."""
    if step == 3 and scenario == "sleeps" and rank == 1:
        sleep_in_the_data()
    if step == 3 and scenario == "stopped" and rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if step == 3 and scenario == "first stopped" and rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    if step == 3 and scenario == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 3 and scenario == "first killed" and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 3 and scenario == "raises" and rank == 2:
        raise KeyError("no such picture")
    if step == 3 and scenario == "suspended":
        for _ in range(30):  # one long sleep would be over once it goes on
            (folder / f"ready-{rank}").touch()
            time.sleep(0.08)


def wait_until_the_others_have_asked(watchdog):
    """An evaluation that lasts until a question of those that wait for it has been decided."""
    while watchdog._speaker.current_round() == 0:
        time.sleep(0.1)


def train(rank, scenario, folder):
    """Steps of a batch and a collective, under a watchdog."""
    heartbeats = [Heartbeat(step=0, phase="getting ready", order=0, limit_seconds=60)]
    watchdog = HangWatchdog(
        lambda: heartbeats[-1],
        stacks=folder / f"rank={rank}.txt",
        group=dist.group.WORLD,
        end_children=lambda: None,
    )

    def note(**progress):
        heartbeats.append(Heartbeat(**progress))

    watchdog.start()
    limit = SUSPENDED_LIMIT_SECONDS if scenario == "suspended" else STALL_SECONDS
    try:
        for step in range(1, 6):
            note(step=step, phase="waiting for data", order=1, limit_seconds=limit)
            read_batch(rank, scenario, step, folder)
            note(step=step, phase="step", order=2, limit_seconds=limit)
            sum_over_ranks(torch.ones(2))
            if scenario == "slow evaluation":
                note(step=step, phase="evaluation", order=4, limit_seconds=1000)
                if step == 3 and rank == 1:
                    wait_until_the_others_have_asked(watchdog)
    except (RuntimeError, KeyError) as error:
        sys.stderr.write(f"explained: {watchdog.explain(error)}\n")
        raise
    watchdog.stop()


def enter(rank, scenario, port, folder):
    """Become a rank: a store over TCP, as launchers make it, kept by the first rank."""
    with (folder / f"stderr-{rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(minutes=30),
    )
    train(rank, scenario, folder)
    dist.barrier()


def fork(rank, scenario, port, folder):
    """Return the process id of a rank."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        enter(rank, scenario, port, folder)
        code = 0
    finally:
        os._exit(code)


def send(pids, number):
    """Send a signal to those that are left."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def main(*words):
    """Run all scenarios at once; the words are a port and a scenario, again and again."""
    scenarios = dict(zip(words[1::2], map(int, words[::2]), strict=True))
    root = Path(tempfile.mkdtemp())
    ranks, started = {}, time.monotonic()
    for scenario, port in scenarios.items():
        folder = root / scenario
        folder.mkdir()
        for rank in range(WORLD_SIZE):
            ranks[fork(rank, scenario, port, folder)] = (scenario, rank)
    pids = {place: pid for pid, place in ranks.items()}
    results = {scenario: [None] * WORLD_SIZE for scenario in scenarios}
    suspended = [pids[place] for place in pids if place[0] == "suspended"]
    ready = [root / "suspended" / f"ready-{rank}" for rank in range(WORLD_SIZE)]
    going_on = 0.0
    while ranks:
        seconds = time.monotonic() - started
        if suspended and not going_on and all(path.exists() for path in ready):
            time.sleep(1.3)  # for the watchdogs to see how far the ranks are
            send(suspended, signal.SIGSTOP)
            going_on = seconds + 1.3 + SUSPENDED_SECONDS
        elif going_on and seconds > going_on:
            send(suspended, signal.SIGCONT)
            suspended, going_on = [], 0.0
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            scenario, rank = ranks.pop(pid)
            results[scenario][rank] = [os.waitstatus_to_exitcode(status)]
            # One that has stopped is ended by its launcher once the others are gone.
            left = [p for p, (s, _) in ranks.items() if s == scenario]
            if len(left) == 1 and "stopped" in scenario:
                os.kill(left[0], signal.SIGKILL)
        elif seconds > LIMIT_SECONDS:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for scenario, found in results.items():
        for rank, result in enumerate(found):
            stacks = root / scenario / f"rank={rank}.txt"
            result.append((root / scenario / f"stderr-{rank}").read_text())
            result.append(stacks.read_text() if stacks.exists() else "")
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
