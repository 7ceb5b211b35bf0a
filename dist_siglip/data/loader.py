"""How are batches prepared ahead of the step that needs them?"""

import os
import signal
from collections.abc import Iterator
from multiprocessing import active_children, queues, util
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from dist_siglip.data.batch import PairCollator, PairSample
from dist_siglip.data.dataset import PairDataset
from dist_siglip.data.loader_failure import failed_to_deliver, loader_failure
from dist_siglip.data.position import EvaluationBatchSampler, GlobalBatchSampler
from dist_siglip.system.signals import SIGNALS


def build_loader(
    dataset: PairDataset,
    sampler: GlobalBatchSampler | EvaluationBatchSampler,
    collate: PairCollator,
    *,
    workers_per_rank: int,
    prefetch_factor: int,
    pin_memory: bool,
) -> DataLoader[PairSample]:
    """Build a loader of ``ImageTextBatch`` whose processes outlive epochs and cluster signals.

    Args:
        dataset: pairs by slot.
        sampler: lists of slots, one list a batch.
        collate: samples to batch.
        workers_per_rank: loader processes, of one thread each; 0 loads in this process.
        prefetch_factor: batches each loader process prepares ahead.
        pin_memory: whether batches are copied to page-locked memory, for a GPU.
    """
    has_workers = workers_per_rank > 0
    return PairLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers_per_rank,
        prefetch_factor=prefetch_factor if has_workers else None,
        persistent_workers=has_workers,
        worker_init_fn=prepare_worker,
        pin_memory=pin_memory,
    )


class PairLoader(DataLoader[PairSample]):
    """A loader whose processes end the run when they cannot deliver, instead of being waited for.

    Raises:
        LoaderError: while it is iterated over.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own class
        """Start the processes, if they do not run, and yield batches."""
        if not self.num_workers:
            return super().__iter__()
        try:
            batches = super().__iter__()
        except OSError as error:
            raise failed_to_deliver(f"could not be started: {error}") from error
        return _deliver(batches)


class _NotHandedOver(NamedTuple):
    """Stands for a batch that a loader process has, but cannot hand over."""

    reason: str


def _deliver(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from map(_handed_over, batches)
    except Exception as error:
        # Deaf to SIGTERM, one that is stuck would be waited for at the end of this process.
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
    """Make a loader process deaf to the signals meant for the training process.

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
