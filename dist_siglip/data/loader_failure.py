"""One line about a loader process that has died or failed: which, of what, and what mends it."""

import re
import resource
import shutil

from dist_siglip.errors import LoaderError, OutageError, RunFailedError, UserError

_RAISED = re.compile(r"Caught \w+ in DataLoader worker process (\d+)")
_DIED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([A-Za-z ]+)|exited)"
)
_FILES = re.compile(r"too many open files|\bancdata\b|errno 24", re.I)
_HUNG_UP = re.compile(r"EOFError|Connection\w*Error")
_MEMORY = re.compile(r"bus error|shared memory|no space left|errno 28", re.I)
_KILLED = re.compile(
    r"killed|exited unexpectedly|cannot allocate memory|errno 12|memoryerror", re.I
)


def loader_failure(error: BaseException | None) -> Exception | None:
    """Return what ends a run that ``error`` came to; None if no loader process is behind it.

    torch raises for a process that has died wherever the training process happens to be, and hands
    over what one has raised with its traceback as the text. A mistake of the user stays one.

    Example:
        >>> dead = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        >>> print(str(loader_failure(dead)).split(";")[0])
        loader process (pid 7) was killed by signal: Killed
        >>> loader_failure(KeyError("a")) is None
        True
    """
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, LoaderError):
            return error
        text = str(error)
        if (raised := _RAISED.search(text)) is not None:
            return _raised(error, raised.group(1), text)
        if (died := _DIED.search(text)) is not None:
            signal = (died.group(2) or "").strip()
            how = f"was killed by signal: {signal}" if signal else "ended unexpectedly"
            return LoaderError(f"loader process (pid {died.group(1)}) {how}; {_remedy(text)}")
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


def failed_to_deliver(reason: str) -> LoaderError:
    """Return the error of loader processes that cannot start, or hand a batch over."""
    told = " ".join(reason.split()).partition(". ")[0].rstrip(": ")[:300]
    return LoaderError(f"loader processes: {told}; {_remedy(reason)}")


def _raised(error: BaseException, worker: str, text: str) -> Exception:
    last = text.strip().splitlines()[-1].strip()
    if isinstance(error, (UserError, RunFailedError, OutageError)):
        return type(error)(last.partition(": ")[2] or last)
    return LoaderError(f"loader process {worker} failed: {last[:300]}; {_remedy(last, text)}")


def _remedy(reason: str, report: str = "") -> str:
    """Say what mends it; without a known cause, show the traceback of the process."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _HUNG_UP.search(reason):
        return (
            "the process hung up: it was killed, perhaps for memory, or may open no more files "
            f"(ulimit -n is {files}); lower data.workers_per_rank, or ask for more"
        )
    if _FILES.search(reason):
        return (
            f"raise the limit of open files (ulimit -n is {files}) or lower data.workers_per_rank"
        )
    if _MEMORY.search(reason):
        try:
            free = f"{shutil.disk_usage('/dev/shm').free / 2**20:.0f} MiB"
        except OSError:
            free = "nothing"
        return (
            f"/dev/shm, through which batches go, has {free} free: give the container more "
            "(docker: --shm-size, --ipc=host), or lower data.workers_per_rank and "
            "data.prefetch_factor"
        )
    if _KILLED.search(reason):
        return "if memory ran out, ask for more, or lower data.workers_per_rank"
    return " | ".join(report.split("\n"))[:1500] if report else "the lines above may say why"
