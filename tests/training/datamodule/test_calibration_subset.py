"""The calibration subset is the start of epoch 0, once each, whoever loads it."""

from itertools import chain
from types import SimpleNamespace

import pytest

from dist_siglip.data import PairDataset, build_pair_table, epoch_order, evaluation_transform
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.distributed import World
from dist_siglip.errors import UserError
from dist_siglip.training.datamodule.calibration_subset import subset_loader, subset_positions
from tests.support.shards import UNEVEN, tiny_inputs, write_shards


def sample_ids(num_pairs, world_size, **settings):
    by_rank = [
        subset_positions(UNEVEN, num_pairs, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]
    return [[slot.sample_id for batch in batches for slot in batch] for batches in by_rank]


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_ranks_share_the_first_pairs_of_epoch_0(world_size):
    shares = sample_ids(20, world_size, seed=5, block_shards=2)
    assert sorted(chain(*shares)) == sorted(epoch_order(5, 0, UNEVEN, 2)[:20].tolist())
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_pairs_than_there_are_means_all():
    (share,) = sample_ids(4096, 1, seed=0, block_shards=2)
    assert sorted(share) == list(range(sum(UNEVEN)))


def test_batches_are_small():
    batches = subset_positions([1000], 200, seed=0, block_shards=1, rank=0, world_size=1)
    assert [len(batch) for batch in batches] == [64, 64, 64, 8]


@pytest.mark.parametrize(
    ("num_pairs", "world_size", "message"),
    [(1, 1, r"\(1\) must be at least 2"), (2, 3, r"\(2\) must be at least one for each of 3")],
)
def test_too_few_pairs_are_refused(num_pairs, world_size, message):
    with pytest.raises(UserError, match=message):
        sample_ids(num_pairs, world_size, seed=0, block_shards=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_brings_them(tmp_path, workers):
    table = build_pair_table(write_shards(tmp_path), image_extensions=("png",), name="train_shards")
    dataset = PairDataset(
        table,
        evaluation_transform(tiny_inputs()),
        seed=0,
        pictures=PicturePolicy(max_image_pixels=10**6),
    )
    settings = SimpleNamespace(
        seed=3, block_shards=2, workers_per_rank=workers, inputs=tiny_inputs()
    )
    found = []
    for rank in range(2):
        for batch in subset_loader(dataset, 9, settings, World(rank=rank, world_size=2)):
            assert batch.images.shape[1:] == (3, 16, 16)
            found += batch.sample_ids.tolist()
    assert sorted(found) == sorted(epoch_order(3, 0, UNEVEN, 2)[:9].tolist())


def test_a_loader_needs_to_know_the_inputs():
    settings = SimpleNamespace(seed=3, block_shards=2, workers_per_rank=0, inputs=None)
    with pytest.raises(UserError, match=r"inputs \(null\)"):
        subset_loader(None, 9, settings, World())
