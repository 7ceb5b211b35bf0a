import itertools

import numpy as np
import pytest

from dist_siglip.data.order.sequence import EpochOrder, epoch_order

GRID = list(
    itertools.product(
        (0, 1, 7, 2**40),  # seed
        (0, 1, 30),  # epoch
        ((1,), (5,), (3, 1, 4, 1, 5), (0, 2, 0), (100, 1, 50, 9), tuple(range(20))),  # counts
        (1, 2, 3, 100),  # block_shards
    )
)


@pytest.mark.parametrize(("seed", "epoch", "counts", "block_shards"), GRID)
def test_order_is_a_permutation_and_repeats(seed, epoch, counts, block_shards):
    order = epoch_order(seed, epoch, counts, block_shards)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(sum(counts)))
    assert np.array_equal(order, epoch_order(seed, epoch, counts, block_shards))


@pytest.mark.parametrize(("seed", "epoch", "counts", "block_shards"), GRID[:40])
def test_any_part_of_an_order_is_that_part_of_the_whole(seed, epoch, counts, block_shards):
    whole = epoch_order(seed, epoch, counts, block_shards).tolist()
    for start in range(0, len(whole) + 1, 3):
        for stop in range(start, len(whole) + 1, 4):
            part = EpochOrder(seed, epoch, counts, block_shards).ids(start, stop)
            assert part.tolist() == whole[start:stop]


def test_blocks_are_announced_where_they_begin():
    counts = (4, 7, 2, 9, 5)
    shard_of = np.repeat(np.arange(5), counts)
    order = EpochOrder(3, 0, counts, 2)
    blocks = [*order.shards(0)]
    assert sorted(shard for _, shards in blocks for shard in shards) == [*range(5)]
    for first, shards in blocks:
        assert int(shard_of[order.ids(first, first + 1)[0]]) in shards
    assert [*order.shards(26)] == blocks[-1:]


def test_sources_have_orders_of_their_own():
    counts = (10, 20, 30)
    ids = [tuple(EpochOrder(0, 0, counts, 2, source).ids(0, 60)) for source in range(4)]
    assert len(set(ids)) == 4


def test_epochs_and_seeds_differ():
    counts = (10, 20, 30)
    keys = itertools.product(range(5), range(5))
    orders = [tuple(epoch_order(seed, epoch, counts, 2).tolist()) for seed, epoch in keys]
    assert len(set(orders)) == 25


@pytest.mark.parametrize("block_shards", [1, 2, 3])
def test_blocks_are_read_one_after_the_other(block_shards):
    counts = (4, 7, 2, 9, 5)
    shard_of = np.repeat(np.arange(5), counts)
    visited = shard_of[epoch_order(3, 0, counts, block_shards)]
    first = [int(np.flatnonzero(visited == shard)[0]) for shard in range(5)]
    last = [int(np.flatnonzero(visited == shard)[-1]) for shard in range(5)]
    for place in range(len(visited)):
        reading = sum(start <= place <= end for start, end in zip(first, last, strict=True))
        assert reading <= block_shards


def test_samples_mix_inside_a_block():
    order = epoch_order(0, 0, (50, 50), 2)
    assert 10 < np.count_nonzero(order[:50] < 50) < 40


def test_every_position_sees_every_sample_equally_often():
    seen = np.zeros((6, 6))
    for epoch in range(6000):
        seen[np.arange(6), epoch_order(1, epoch, (2, 2, 2), 2)] += 1
    assert np.all(np.abs(seen - 1000) < 150)
