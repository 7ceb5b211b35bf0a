"""The memory of a loader process stays where it is, epoch after epoch."""

import gc
import os

import pytest

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.position import BatchPlan, GlobalBatchSampler, Progress
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import training_transform
from dist_siglip.system.process_pool import map_isolated
from tests.support.shards import jpeg, photo, tiny_inputs, write_shard

SHARDS, SAMPLES, EPOCHS = 70, 12, 7  # more shards than a reader keeps open


def resident_mib():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def read_epochs(shards):
    """Resident memory of a process after each epoch over shards with some bad samples."""
    rule = CaptionRule(members=("txt", "json"), pick="random")
    table = build_pair_table(shards, image_extensions=("jpg",), caption_extensions=rule.members)
    data = PairDataset(
        table,
        training_transform(tiny_inputs(), (0.5, 1.0)),
        seed=0,
        pictures=PicturePolicy(max_image_pixels=10**6),
        captions=rule,
        stages=[lambda samples: iter(samples)],
    )
    plan = BatchPlan(
        counts=table.counts,
        fingerprint="",
        seed=0,
        global_batch_size=SAMPLES,
        block_shards=4,
    )
    sampler = iter(GlobalBatchSampler(plan, rank=0, world_size=1, progress=Progress()))
    found = []
    for _ in range(EPOCHS):
        for _ in range(plan.batches_per_epoch):
            for slot in next(sampler):
                data[slot]
        found.append(resident_mib())
    return found


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_loader_process_does_not_grow_over_epochs(tmp_path):
    picture = jpeg(photo(300, 200))
    shards = []
    for number in range(SHARDS):
        members = [
            (
                f"{number:03d}{i:03d}",
                {
                    "jpg": picture if i else b"bad",
                    "txt": b"a caption",
                    "json": b'{"caption": ["one", "two"]}',
                },
            )
            for i in range(SAMPLES)
        ]
        shards.append(str(write_shard(tmp_path / f"{number:03d}.tar", members, mtime=0)))
    (outcome,) = map_isolated(read_epochs, [shards], workers=1)
    assert outcome.failure == ""
    after_two, *later = outcome.result[1:]
    assert max(later) - after_two < 4, outcome.result
