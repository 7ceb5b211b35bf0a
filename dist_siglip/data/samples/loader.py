"""Loader of batches in pieces, and the errors of its processes in one line."""

import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from itertools import islice
from multiprocessing import active_children, queues, util
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from dist_siglip.data.order.position import EvaluationBatchSampler, GlobalBatchSampler
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.samples.batch import BatchPieces, PairCollator, PairSample
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.errors import LoaderError, OutageError, RunFailedError, UserError
from dist_siglip.system.signals import SIGNALS

PIECE_ROWS = 256  # 37 MiB of pictures at 224 pixels

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


def build_loader(
    dataset: PairDataset,
    sampler: GlobalBatchSampler | EvaluationBatchSampler,
    collate: PairCollator,
    *,
    workers_per_rank: int,
    prefetch_factor: int,
    pin_memory: bool,
    piece_rows: int = PIECE_ROWS,
) -> "PairLoader":
    """Build a loader of ``ImageTextBatch`` whose processes outlive epochs and cluster signals.

    The processes share every batch: each hands over pieces of it, which are joined here in order.
    So the first batch takes the time of its share, and what lies in shared memory is bounded by
    ``Feed``.

    Args:
        dataset: pairs by position.
        sampler: lists of positions, one list a batch.
        collate: samples to batch.
        workers_per_rank: loader processes, of one thread each; 0 loads in this process.
        prefetch_factor: batches that all loader processes together prepare ahead.
        pin_memory: for a GPU: pieces are copied to page-locked memory as they come, and handed on
            as ``BatchPieces``, to be joined on the device.
        piece_rows: most rows of a piece.
    """
    has_workers = workers_per_rank > 0
    feed = Feed(sampler.local_batch_size, workers_per_rank, prefetch_factor, piece_rows)
    return PairLoader(
        dataset,
        batch_sampler=Pieces(sampler, piece_rows) if has_workers else sampler,
        collate_fn=collate,
        num_workers=workers_per_rank,
        prefetch_factor=feed.pieces_ahead if has_workers else None,
        persistent_workers=has_workers,
        worker_init_fn=prepare_worker,
        pin_memory=pin_memory,
    )


class Feed(NamedTuple):
    """What the loader processes of one rank have ready at most.

    Attributes:
        local_batch_size: rows of a batch of the rank.
        workers: loader processes of the rank.
        prefetch_factor: batches that they prepare ahead, all together.
        piece_rows: most rows of a piece.

    Example:
        >>> feed = Feed(local_batch_size=4096, workers=8, prefetch_factor=2)
        >>> feed.pieces_ahead, feed.rows, round(feed.picture_bytes(224, 224) / 2**30, 2)
        (4, 12288, 1.72)
    """

    local_batch_size: int
    workers: int
    prefetch_factor: int
    piece_rows: int = PIECE_ROWS

    @property
    def pieces_ahead(self) -> int:
        """Pieces that each process prepares ahead; at least ``prefetch_factor``."""
        pieces = -(-self.local_batch_size // self.piece_rows)
        return max(self.prefetch_factor, -(-self.prefetch_factor * pieces // max(1, self.workers)))

    @property
    def rows(self) -> int:
        """Rows in shared memory: those ahead, and the batch (or two of one piece) in use."""
        piece = min(self.local_batch_size, self.piece_rows)
        in_use = max(self.local_batch_size, 2 * piece)
        return self.workers and self.workers * self.pieces_ahead * piece + in_use

    def picture_bytes(self, height: int, width: int) -> int:
        """Bytes of their pictures, one for each of three colours of a pixel."""
        return self.rows * 3 * height * width


class Pieces:
    """Batch sampler that cuts the batches of another into pieces, in order.

    Args:
        sampler: of whole batches.
        rows: most rows of a piece.
    """

    def __init__(self, sampler: GlobalBatchSampler | EvaluationBatchSampler, rows: int) -> None:
        self.sampler = sampler
        self.rows = rows

    def __iter__(self) -> Iterator[list[StreamPosition]]:
        for positions in self.sampler:
            for start in range(0, len(positions), self.rows):
                yield positions[start : start + self.rows]


class PairLoader(DataLoader[PairSample]):
    """A loader whose processes end the run when they cannot deliver, instead of being waited for.

    Raises:
        LoaderError: while it is iterated over.
    """

    def __len__(self) -> int:
        """Batches of a pass; a TypeError where there is no end."""
        pieces = self.batch_sampler
        return len(pieces.sampler) if isinstance(pieces, Pieces) else super().__len__()  # type: ignore[arg-type]  # the endless one has no length

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own class
        """Start the processes, if they do not run, and yield batches."""
        if not self.num_workers:
            return super().__iter__()
        try:
            batches = super().__iter__()
        except OSError as error:
            raise failed_to_deliver(f"could not be started: {error}") from error
        return self._batches(_deliver(batches))

    def _batches(self, delivered: Iterator[Any]) -> Iterator[Any]:
        """Join the pieces of each batch; of one piece it is the piece."""
        sampler = self.batch_sampler
        if not isinstance(sampler, Pieces):
            yield from delivered
            return
        for size in sampler.sampler.batch_sizes():
            pieces = tuple(islice(delivered, -(-size // sampler.rows)))
            if len(pieces) == 1:
                yield pieces[0]
            else:
                batch = BatchPieces(pieces)
                del pieces
                yield batch if self.pin_memory else batch.join(torch.device("cpu"))
        next(delivered, None)  # the end, which the processes wait for


class _NotHandedOver(NamedTuple):
    """Stands for a batch that a loader process has, but cannot hand over."""

    reason: str


def _deliver(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from map(_handed_over, batches)
    except Exception as error:
        # It ignores SIGTERM: one that is stuck would be waited for at the end of this process.
        util.Finalize(None, _end_processes, exitpriority=100)
        text = f"{type(error).__name__}: {error}"
        raise (loader_failure(error) or failed_to_deliver(text)) from error


def _handed_over(batch: Any) -> Any:
    if isinstance(batch, _NotHandedOver):
        raise failed_to_deliver(f"a batch could not be handed over: {batch.reason}")
    return batch


def _end_processes() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for each
    for process in active_children():
        process.kill()


def _hand_over_reason(queue: Any, error: Exception, item: Any) -> None:
    """Send why an item of a queue was not sent, where multiprocessing only prints it.

    The training process would wait for that batch without end: the loader process lives.
    """
    if isinstance(item, tuple) and len(item) == 2:
        queue.put((item[0], _NotHandedOver(f"{type(error).__name__}: {error}")))


def prepare_worker(worker: int) -> None:
    """Let a loader process ignore the signals meant for the training process.

    SLURM signals every process of a step, a terminal every process of its foreground, and the
    default action is death. Once the training process ends, its loader processes do, too.

    Args:
        worker: number of the loader process; not used.
    """
    queues.Queue._on_queue_feeder_error = _hand_over_reason  # type: ignore[attr-defined]
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # One loader process is one core; tokenizers would start a thread for each core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
