"""How are batches prepared ahead of the step that needs them?"""

import os
import signal

from torch.utils.data import DataLoader

from dist_siglip.data.batch import PairCollator, PairSample
from dist_siglip.data.dataset import PairDataset
from dist_siglip.data.position import EvaluationBatchSampler, GlobalBatchSampler


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
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers_per_rank,
        prefetch_factor=prefetch_factor if has_workers else None,
        persistent_workers=has_workers,
        worker_init_fn=prepare_worker,
        pin_memory=pin_memory,
    )


def prepare_worker(worker: int) -> None:
    """Make a loader process deaf to the signals a cluster sends to the training process.

    SLURM signals every process of a step, and the default action of SIGUSR1 and SIGTERM is death.

    Args:
        worker: number of the loader process; not used.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # One loader process is one core; tokenizers would start a thread for each core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
