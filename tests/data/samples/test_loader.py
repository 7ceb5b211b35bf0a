import itertools
import os
import time

import pytest
import torch

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.position import BatchPlan, GlobalBatchSampler, Progress
from dist_siglip.data.samples.batch import PairCollator
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.loader import build_loader
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import training_transform
from dist_siglip.system.signals import SIGNALS
from tests.support.shards import tiny_inputs, tokenize, write_shards

# Python 3.12 warns wherever a process with threads forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
STEPS = 7  # 37 samples, batches of 8: four an epoch


def loader(shards, *, workers=0, rank=0, world_size=1, samples_consumed=0):
    table = build_pair_table(shards, image_extensions=("png",))
    plan = BatchPlan(
        counts=table.counts,
        fingerprint=table.fingerprint,
        seed=1,
        global_batch_size=8,
        block_shards=2,
    )
    transform = training_transform(tiny_inputs(), (0.3, 1.0))
    return build_loader(
        PairDataset(table, transform, seed=1, pictures=PicturePolicy(max_image_pixels=10_000)),
        GlobalBatchSampler(
            plan, rank=rank, world_size=world_size, progress=Progress(samples_consumed)
        ),
        PairCollator(tokenize),
        workers_per_rank=workers,
        prefetch_factor=2,
        pin_memory=False,
    )


def take(batches, count):
    return [
        [f.clone() for f in batch if f is not None] for batch in itertools.islice(batches, count)
    ]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for left, right in zip(ours, theirs, strict=True):
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b)


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_count_changes_nothing(shards, workers):
    assert_equal(take(loader(shards, workers=workers), STEPS), take(loader(shards), STEPS))


def test_stops_with_other_worlds_and_workers_change_nothing(shards):
    expected = take(loader(shards), STEPS)
    seen = []
    for world_size, workers, steps in ((1, 2, 2), (2, 1, 1), (1, 0, 2), (4, 0, 2)):
        ranks = [
            take(
                loader(
                    shards,
                    workers=workers,
                    rank=rank,
                    world_size=world_size,
                    samples_consumed=8 * len(seen),
                ),
                steps,
            )
            for rank in range(world_size)
        ]
        batches = zip(*ranks, strict=True)
        seen += [[torch.cat(fields) for fields in zip(*parts, strict=True)] for parts in batches]
    assert_equal(seen, expected)


def test_workers_outlive_cluster_signals(shards):
    source = loader(shards, workers=1)
    batches = iter(source)
    first = next(batches)
    (worker,) = source._iterator._workers
    for number in SIGNALS:
        os.kill(worker.pid, number)
    time.sleep(0.1)
    assert worker.is_alive()
    rest = take(batches, STEPS - 1)
    first = [field for field in first if field is not None]
    assert_equal([first, *rest], take(loader(shards), STEPS))


def test_two_passes_over_one_loader_agree(shards):
    persistent = loader(shards, workers=1)
    assert_equal(take(persistent, 3), take(persistent, 3))
