"""Run a function on several gloo processes and bring the results home.

Rendezvous goes over a temporary file, so tests never fight over a port; every process uses one
thread; a failing rank shows its own traceback; a hanging rank is ended by the time limit. All are
forked from a process that has done the imports (``warm_imports``), so that a start costs little.
"""

import faulthandler
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dist_siglip.distributed import leave_process_groups

# What hangs is ended after this; ten times and more of what any call takes on a quiet machine.
LIMIT_SECONDS = 600.0
# pytest besides: every child looks at the main module of the tests.
IMPORTED_ONCE = ["pytest", "tests.support.warm_imports"]


def _enter(
    rank: int, world_size: int, folder: str, timeout_seconds: float, environ, fn, args
) -> None:
    faulthandler.enable()  # a rank that is aborted says where
    # Those of the process that was forked are of an earlier test.
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        result = fn(rank, world_size, *args)
        torch.save(result, f"{folder}/result-{rank}.pt")
    finally:
        leave_process_groups()


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120.0,
    limit_seconds: float = LIMIT_SECONDS,
    start_method: str = "forkserver",
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on ``world_size`` processes; return results by rank.

    "fork" takes this process as it is, which must have no threads yet. ``fn`` and ``args`` must be
    picklable (a module-level function). A rank that raises makes
    this raise ``torch.multiprocessing.ProcessRaisedException`` with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        if start_method == "forkserver":
            multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
        context = mp.start_processes(
            _enter,
            args=(world_size, folder, timeout_seconds, dict(os.environ), fn, args),
            nprocs=world_size,
            join=False,
            start_method=start_method,
        )
        deadline = time.monotonic() + limit_seconds
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(
                    f"{fn.__name__} on {world_size} ranks ran past {limit_seconds} s"
                )
        paths = [Path(folder) / f"result-{rank}.pt" for rank in range(world_size)]
        return [torch.load(path, weights_only=False) for path in paths]
