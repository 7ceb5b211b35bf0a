"""Runs of ``fit`` on two ranks, of which one stands still, dies or was started differently.

As a script it imports everything once and forks the ranks, which end their process. It prints a
JSON object: scenario -> [[exit code, stderr] of each rank].
"""

import itertools
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import yaml
from lightning.pytorch import Callback

WORLD_SIZE = 2
LIMIT_SECONDS = 240.0  # of a scenario; below ``slow_minutes``, well above ``stall_minutes``
_samples = itertools.count()


def _rank():
    return int(os.environ.get("LOCAL_RANK", "0"))


def stand_still_in_the_data():
    time.sleep(1000)


def sleep_on_rank_1(samples):
    """A stage between decoding and transform that hangs after 50 samples."""
    for sample in samples:
        if _rank() == 1 and next(_samples) == 50:
            stand_still_in_the_data()
        yield sample


class Fault(Callback):
    """Takes long where a run may, first step and evaluation; then rank 1 goes wrong in step 6.

    Args:
        kind: what goes wrong: "sleep", "stop", "kill", "raise", or "none".
        slow_seconds: of rank 1 in its first step, and of rank 0 in its evaluation.
    """

    def __init__(self, kind: str = "none", slow_seconds: float = 0.0):
        self.kind = kind
        self.slow_seconds = slow_seconds

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 0 and _rank() == 1:
            time.sleep(self.slow_seconds)
        if trainer.global_step == 5 and _rank() == 1 and self.kind != "none":
            if self.kind == "sleep":
                time.sleep(1000)
            if self.kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("a defect of rank 1")

    def on_validation_epoch_end(self, trainer, pl_module):
        if _rank() == 0:
            time.sleep(self.slow_seconds)


def fork(rank, port, folder, arguments):
    """Return the process id of a rank that torchrun could have started."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with (folder / f"stderr-{rank}").open("w") as file:
            os.dup2(file.fileno(), 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(WORLD_SIZE),
            "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        from dist_siglip.cli import main

        code = main(["fit", *arguments, f"--run_dir={folder / 'run'}"])
    except Exception:
        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_all(scenarios):
    """Run scenarios one after another: name -> (port, folder, arguments of each rank)."""
    import dist_siglip.cli.run.training  # noqa: F401 - once for all ranks

    results = {}
    for name, (port, folder, arguments) in scenarios.items():
        Path(folder).mkdir()
        pids = {fork(r, port, Path(folder), arguments[r]): r for r in range(WORLD_SIZE)}
        results[name] = wait_for(pids, Path(folder))
    return results


def wait_for(ranks, folder):
    """Return code and stderr of each rank."""
    deadline, found = time.time() + LIMIT_SECONDS, {}
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            found[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
        # A launcher kills what is left once a rank has failed; the first has the log.
        if time.time() > deadline or (found.get(0) and len(ranks) == 1 and is_stopped(ranks)):
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    said = [(folder / f"stderr-{rank}").read_text() for rank in range(WORLD_SIZE)]
    return [[found[rank], said[rank]] for rank in range(WORLD_SIZE)]


def is_stopped(pids):
    """Whether a process has been stopped by a signal."""
    (pid,) = pids
    return "State:\tT" in Path(f"/proc/{pid}/status").read_text()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_all(yaml.safe_load(sys.stdin.read()))))
