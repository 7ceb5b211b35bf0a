import itertools
import multiprocessing
import os
import time

import pytest
import torch

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.position import BatchPlan, GlobalBatchSampler, Progress
from dist_siglip.data.samples.batch import BatchPieces, ImageTextBatch, PairCollator
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.loader import Feed, Pieces, build_loader
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.stages import (
    ColorJitter,
    RandAugment,
    RandomAffine,
    RandomFlip,
    TimmAugment,
)
from dist_siglip.data.samples.transforms import training_transform
from dist_siglip.system.signals import SIGNALS
from tests.support.shards import tiny_inputs, tokenize, write_shards

# Python 3.12 warns wherever a process with threads forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
STEPS = 7  # 37 samples, batches of 8: four an epoch


def loader(
    shards,
    *,
    workers=0,
    rank=0,
    world_size=1,
    samples_consumed=0,
    piece_rows=3,
    pin_memory=False,
    stages=(),
):
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
        PairDataset(
            table,
            transform,
            seed=1,
            pictures=PicturePolicy(max_image_pixels=10_000),
            stages=stages,
        ),
        GlobalBatchSampler(
            plan, rank=rank, world_size=world_size, progress=Progress(samples_consumed)
        ),
        PairCollator(tokenize),
        workers_per_rank=workers,
        prefetch_factor=2,
        pin_memory=pin_memory,
        piece_rows=piece_rows,
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


@pytest.mark.parametrize(("workers", "piece_rows"), [(1, 8), (2, 3), (2, 1)])
def test_neither_processes_nor_pieces_change_anything(shards, workers, piece_rows):
    found = take(loader(shards, workers=workers, piece_rows=piece_rows), STEPS)
    assert_equal(found, take(loader(shards), STEPS))


class Counted:
    """Items that know their loader process, and how many were made."""

    def __init__(self):
        self.made = multiprocessing.get_context("fork").Value("i", 0)

    def __len__(self):
        return 10**6

    def __getitem__(self, position):
        with self.made.get_lock():
            self.made.value += 1
        worker = torch.utils.data.get_worker_info()
        return position, 0 if worker is None else worker.id


def collate_counted(items):
    positions, workers = torch.tensor(items).T
    rows = len(items)
    return ImageTextBatch(
        torch.zeros(rows, 3, 2, 2, dtype=torch.uint8),
        torch.zeros(rows, 1, dtype=torch.long),
        workers,
        positions,
        torch.ones(rows, dtype=torch.bool),
        torch.zeros(rows, dtype=torch.bool),
    )


class Numbers:
    local_batch_size = 16

    def __iter__(self):
        return iter([list(range(16)), list(range(16, 32)), list(range(32, 37))])

    def __len__(self):
        return 3

    def batch_sizes(self):
        return iter((16, 16, 5))


def counted(piece_rows, workers=2):
    items = Counted()
    return items, build_loader(
        items,
        Numbers(),
        collate_counted,
        workers_per_rank=workers,
        prefetch_factor=1,
        pin_memory=False,
        piece_rows=piece_rows,
    )


def shares(batch):
    return torch.bincount(batch.caption_ids, minlength=2).tolist()


def test_loader_processes_share_the_first_batch_and_each_one():
    """A whole batch of one process, as without pieces, is told apart."""
    _, source = counted(2)
    assert len(source) == 3
    first, second, last = source
    assert shares(first) == shares(second) == [8, 8]
    assert torch.cat([first.sample_ids, second.sample_ids, last.sample_ids]).equal(torch.arange(37))
    assert len(last.images) == 5
    _, whole = counted(16)
    assert shares(next(iter(whole))) == [16, 0]


def test_no_more_is_made_ahead_than_is_promised():
    feed = Feed(16, workers=2, prefetch_factor=1, piece_rows=2)
    assert feed.pieces_ahead == 4
    assert feed.rows == 2 * 4 * 2 + 16
    items, source = counted(2)
    batches = iter(source)
    next(batches)
    seen = items.made.value
    for _ in range(200):  # until they rest
        time.sleep(0.01)
        if items.made.value == seen == 32:
            break
        seen = items.made.value
    assert items.made.value == 32 <= feed.rows
    assert len(list(batches)) == 2


def test_shared_memory_does_not_grow_with_batch_times_processes():
    before = 4096 * 2 * 8 * 3 * 224**2  # each of 8 processes had 2 batches of 4,096
    feed = Feed(4096, workers=8, prefetch_factor=2)
    assert feed.picture_bytes(224, 224) < before / 5
    assert Feed(64, workers=2, prefetch_factor=2).rows == 2 * 2 * 64 + 2 * 64
    assert Feed(4096, workers=0, prefetch_factor=2).rows == 0


def test_pieces_for_a_device_are_joined_in_the_order_of_rows():
    rows = [[(position, 0) for position in piece] for piece in Pieces(Numbers(), 2)]
    pieces = tuple(map(collate_counted, rows[:8]))
    batch = BatchPieces(pieces).join(torch.device("cpu"))
    assert batch.sample_ids.tolist() == list(range(16))
    assert batch.image_features is None
    assert batch.images.shape == (16, 3, 2, 2)


AUGMENTATIONS = (
    RandomFlip(spares=None),
    ColorJitter(),
    RandAugment(),
    TimmAugment(),
    RandomAffine(9, 0.1),
)


@pytest.mark.parametrize("stages", [(), AUGMENTATIONS], ids=["crops", "augmentations"])
def test_stops_with_other_worlds_and_workers_change_nothing(shards, stages):
    expected = take(loader(shards, stages=stages), STEPS)
    plain = take(loader(shards), STEPS)
    assert all(map(torch.equal, expected[0], plain[0])) == (not stages)
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
                    stages=stages,
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
